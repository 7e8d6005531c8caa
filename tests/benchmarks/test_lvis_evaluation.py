"""The benchmark runs as a user starts it, at a small size, with one process and with two."""

import json

import lvis_evaluation
import pytest
from helpers.scripts import run_script
from lib import tables


@pytest.mark.parametrize("processes", [1, 2])
def test_the_log_is_shorter_and_the_scores_are_the_same(tmp_path, monkeypatch, processes):
    for name, value in {"NAMES": 12, "CHUNK": 4, "FOUND": 30, "LVIS_VAL": 2000}.items():
        monkeypatch.setattr(lvis_evaluation, name, value)
    monkeypatch.setattr(lvis_evaluation, "QUERIES", {"shared": 10, "own": 30})
    monkeypatch.setattr(lvis_evaluation.evaluator, "PRUNE_EVERY", 8000)
    monkeypatch.setattr(lvis_evaluation, "PER_CLASS", 2000)
    asked = ["--images", 40, "--processes", processes, "--json", tmp_path / "report.json"]
    text = run_script(lvis_evaluation.main, *asked)
    report = json.loads((tmp_path / "report.json").read_text())
    for row in report["rows"]:
        assert row["cut"]["log_bytes"] < 0.8 * row["all"]["log_bytes"]
        assert f"{row['detections']}: three times AP {row['AP']!r}" in text and row["AP"] > 0
        assert row["detections"] in tables.lvis_evaluation(report)
