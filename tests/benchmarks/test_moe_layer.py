"""The benchmark runs as a user starts it, at a size that Triton's interpreter can bear."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/moe_layer.py"


def run(*arguments):
    environment = os.environ | {"TRITON_INTERPRET": "1", "DYNAMIC_DINO_KERNELS": ""}
    return subprocess.run(
        [sys.executable, SCRIPT, "--device", "cpu", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    small = "--tokens 9 --dim 16 --hidden 32 --experts 4 --layers 1 --repeats 2".split()
    files = ["--json", folder / "new" / "report.json", "--plot", folder / "plot.png"]
    done = run(*small, "--routing", "uniform", "zipf", *files)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(files[1].read_text()), files[3]


def test_compares_all_contenders_in_every_case(result):
    _, report, _ = result
    rows = report["rows"]
    cases = {(r["tokens"], r["routing"], r["part"], r["pass"]) for r in rows}
    assert len(rows) == len(cases) == 2 * 2 * 2
    for row in rows:
        assert not row["failed"]
        assert {"dense", "sequential", "grouped", "triton", "HF grouped_mm"} <= set(row["times"])
        for times in row["times"].values():
            assert 0 < times["low_us"] <= times["median_us"] <= times["high_us"]
            assert ("error" in times) == (row["part"] == "ffn" and row["pass"] == "forward")
            assert times.get("error", 0) < 1e-5


def test_says_where_the_numbers_come_from(result):
    text, report, _ = result
    assert report["machine"] and report["versions"]["torch"] and report["commit"]
    assert report["command"].startswith("python ") and "--tokens 9" in report["command"]
    assert "T=9 float32, zipf routing, layer, train" in text and "x dense  error" in text


def test_draws_the_ratios(result):
    assert result[2].stat().st_size > 10_000


def test_wrong_arguments_are_explained():
    done = run("--parts", "router")
    assert done.returncode == 2 and "choose from" in done.stderr
