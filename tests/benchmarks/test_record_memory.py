"""The benchmark of the records' memory, at a thousandth of its size."""

import json

import pytest
import record_memory
from dynamic_dino.data import datasets
from lib import tables as results


@pytest.mark.slow
def test_everything_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(record_memory, "WORKERS", (0, 2))
    try:
        report = record_memory.measure(tmp_path, 1500, 640)
    finally:
        datasets.register_builtin()
    assert report["records"] == sum(row["records"] for row in report["sources"])
    assert 1490 < report["records"] < 1510
    assert [row["source"] for row in report["sources"]] == list(record_memory.SOURCES)
    for row in report["sources"]:
        assert row["bytes_per_record"] < row["bytes_pickled"] < row["bytes_as_dict"]
        assert row["names"] == record_memory.SOURCES[row["source"]][2]
        content = json.loads(datasets.locate_dataset(row["source"], root=tmp_path).file.read_text())
        assert (row["records"], row["boxes"]) == (
            len(content["images"]),
            len(content["annotations"]),
        )
    assert [row["workers"] for row in report["workers"]] == [0, 2]
    assert [len(row["worker_private_bytes"]) for row in report["workers"]] == [0, 2]
    table = results.record_memory(report)
    assert "| v3det_train |" in table and "13,204" in table
