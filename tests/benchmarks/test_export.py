"""The benchmark of exported detectors: its table, and that it goes on where it stopped."""

import json
from pathlib import Path

import export
import pytest
from lib import tables

TIMES = {"median_ms": 50.0, "low_ms": 40.0, "high_ms": 60.0}


def rows_of(model: str) -> list[dict]:
    """As `measure` makes them, of two kinds."""
    eager = {"model": model, "format": "eager", "precision": "float32", "speed": 1.0, **TIMES}
    differs = {"compared": 700, "missing": 3, "extra": 2, "scores": 5e-7, "boxes": 1.2e-5}
    file = {"format": "onnx", "precision": "half", "mb": 27.44, "speed": 2.417, **TIMES, **differs}
    return [row | {"AP": 50.8, "AP50": 75.249} for row in (eager, {"model": model} | file)]


def test_the_table_and_what_is_done_already(tmp_path, monkeypatch, capsys):
    asked = []

    def measure(model, folder, options):
        if model == "nano-x16" and len(asked) == 1:
            raise ValueError("power cut")
        asked.append(model)
        return rows_of(model)

    monkeypatch.setattr(export, "measure", measure)
    file = tmp_path / "export.json"
    monkeypatch.setattr("sys.argv", [str(Path.cwd() / "benchmarks/export.py"), "/of/mine/photos"])
    arguments = ["--photos", "folder", "--test", "val_real", "--threads", "1", "--json", str(file)]
    assert export.main(arguments) == 2 and "power cut" in capsys.readouterr().err
    asked.append("interrupted")
    export.main([*arguments, "--resume", "--photos", "elsewhere"])
    assert asked == ["nano-dense", "interrupted", "nano-x16"]
    printed, report = capsys.readouterr().out, json.loads(file.read_text())
    assert "folder" not in json.dumps(report["settings"])
    assert report["command"] == "python benchmarks/export.py photos"
    assert tables.export(report) in printed

    _, _, *lines = tables.export(report).splitlines()
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    assert [len(line) for line in cells] == [12] * 6 and cells[0][-1] == "AP50 on val_real"
    assert lines[2].startswith("| nano-dense | eager | float32 |  |")
    values = ["27.4", "700", "3", "2", "5.0e-07", "1.2e-05", "2.42", "50.80", "75.25"]
    assert cells[5] == ["nano-x16", "onnx", "half", *values]
    report["settings"]["test"] = None
    assert "AP" not in tables.export(report)

    assert export.main([*arguments, "--resume", "--repeats", "3"]) == 2
    assert "was measured with settings" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export.main(["--models", "nano-x16"])
