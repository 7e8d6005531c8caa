"""fps.py and profile_detector.py run, compare equals, and say where the time goes."""

import json

import fps
import profile_detector
import pytest
import torch
from helpers.scripts import SMALL_NANO

NANO = ["--config-file", "configs/moe_tuning/nano_x16_stamps.py", "--device", "cpu"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fps")
    arguments = "--sizes 64x96 --repeats 2 --text cached encoded --batch 1 2 --many-names 45"
    files = ["--json", str(folder / "fps.json"), "--plot", str(folder / "fps.png")]
    fps.main([*NANO, *arguments.split(), *files, *SMALL_NANO])
    return json.loads((folder / "fps.json").read_text()), folder


@pytest.mark.slow
def test_compares_dense_with_experts_on_every_backend(result):
    report, folder = result
    assert [(r["size"], r["batch"], r["text"]) for r in report["rows"]] == [
        ([64, 96], batch, f"text {text}") for batch in (1, 2) for text in ("cached", "encoded")
    ]
    for row in report["rows"]:
        names = {"dense", "dense, wide", "experts, loop", "experts, sequential", "experts, grouped"}
        assert names <= set(row["results"])
        for r in row["results"].values():
            assert r["fps"] == pytest.approx(row["batch"] * 1e3 / r["median_ms"])
            assert 0 < r["low_ms"] <= r["median_ms"] <= r["high_ms"]
            assert r["ran"] == "eager"
    assert report["many_names"]["pieces"] == 2 and len(report["many_names"]["results"]) == 2
    assert report["settings"]["overrides"] == SMALL_NANO and report["commit"]
    assert (folder / "fps.png").stat().st_size > 5000


def test_detectors_that_differ_are_not_compared():
    case = fps.Case((64, 64), 1, "float32", "eager", "text cached")
    scores = {"dense": torch.zeros(3), "experts, grouped": torch.tensor([0, 0, 0.01])}
    with pytest.raises(SystemExit, match="scores of experts, grouped and dense differ by 0.01"):
        fps.check_equal(scores, case)
    fps.check_equal(scores, fps.Case((64, 64), 1, "float16", "eager", "text cached"))


def test_sizes_are_explained(capsys):
    with pytest.raises(SystemExit):
        fps.main(["--sizes", "640"])
    assert "'640' is not a size such as 640x640" in capsys.readouterr().err


def test_profile_adds_up_and_can_be_looked_at(tmp_path, capsys):
    files = ["--json", str(tmp_path / "p.json"), "--trace", str(tmp_path / "t.json")]
    profile_detector.main([*NANO, "--size", "64x64", "--repeats", "2", *files])
    report = json.loads((tmp_path / "p.json").read_text())
    stages = report["stages_ms"]
    parts = ("backbone", "text encoder", "enhancer", "query selection", "decoder")
    assert 0.5 * stages["all"] < sum(stages[p] for p in parts) <= stages["all"] * 1.01
    inner = [name for name in stages if name.startswith("  ")]
    assert "  FFN or experts" in inner and all(stages[name] > 0 for name in inner)
    # Which of them the experts run on is measured, see serving/packing.py.
    assert any("grouped_ffn" in name or "linear" in name for name in report["operators_ms"])
    assert "FFN or experts" in capsys.readouterr().out
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert any(event.get("name") == "stage: decoder" for event in events)
