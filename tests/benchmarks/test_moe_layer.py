"""The benchmark runs as a user starts it, at a size that Triton's interpreter can bear."""

import json

import moe_layer
import pytest
import torch
from helpers.scripts import run_script
from lib import tables
from lib.phases import ROUTING, peak_bytes, time_by_phase
from torch.profiler import record_function


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    small = "--tokens 4 --dim 16 --hidden 16 --experts 3 --layers 1 --repeats 2".split()
    files = ["--json", folder / "new" / "report.json", "--plot", folder / "plot.png"]
    text = run_script(moe_layer.main, "--device", "cpu", *small, "--routing", "zipf", *files)
    return text, json.loads(files[1].read_text()), files[3]


@pytest.mark.slow
def test_compares_all_candidates_in_every_case(result):
    _, report, _ = result
    rows = report["rows"]
    cases = {(r["tokens"], r["routing"], r["part"], r["pass"]) for r in rows}
    assert len(rows) == len(cases) == 2 * 2
    for row in rows:
        assert not row["failed"]
        names = {"dense", "loop", "sequential", "grouped", "triton", "HF grouped_mm"}
        assert names <= set(row["times"])
        for times in row["times"].values():
            assert 0 < times["low_us"] <= times["median_us"] <= times["high_us"]
            assert ("error" in times) == (row["part"] == "ffn" and row["pass"] == "forward")
            assert times.get("error", 0) < 1e-5


@pytest.mark.slow
def test_says_where_the_numbers_come_from(result):
    text, report, _ = result
    assert report["machine"] and report["versions"]["torch"] and report["commit"]
    assert report["command"].startswith("python ") and "--tokens 4" in report["command"]
    assert "T=4 float32, x3-Top2, zipf routing, layer, train" in text
    assert "x dense  error" in text


@pytest.mark.slow
def test_splits_a_layer_into_phases(result):
    for row in result[1]["rows"]:
        for name, found in row["times"].items():
            assert found["peak_mib"] > 0 and found["ran"] == "eager"
            assert ("phases_us" in found) == (row["part"] == "layer" and row["pass"] == "forward")
            phases = found.get("phases_us", {})
            if name in ("loop", "sequential", "grouped", "HF grouped_mm") and phases:
                assert all(phases[p] > 0 for p in ("routing", "dispatch", "experts", "combine"))
            if name == "dense" and phases:
                assert phases["routing"] == phases["dispatch"] == 0 < phases["experts"]


def test_papers_routers_compute_what_their_tokens_take(tmp_path):
    small = "--tokens 40 --dim 16 --hidden 32 --experts 8 --top-k 2 --layers 1 --repeats 2".split()
    file = tmp_path / "routers.json"
    text = run_script(moe_layer.main, "--device", "cpu", "--routers", *small, "--json", file)
    rows = json.loads(file.read_text())["rows"]
    assert [(row["part"], row["pass"]) for row in rows] == [
        ("layer", "forward"),
        ("layer", "train"),
    ]
    for row in rows:
        times = row["times"]
        assert list(times) == ["dense", "Dynamic-DINO", "HI-MoE", "DynMoE"] and not row["failed"]
        assert "operations" not in times["dense"]
        ours = 1 + 8 / 64  # the router's rows over two matrices of 32 units
        assert times["Dynamic-DINO"]["operations"] == pytest.approx(ours)
        scene = 4 * 16 / (2 * 16 * 32)
        assert times["HI-MoE"]["operations"] == pytest.approx(2 + 8 * 20 / 1024 + scene)
        assert 8 / 64 < times["DynMoE"]["operations"] < 6 + 8 / 64
    assert "x the operations" in text
    assert "(1.12)" in tables.moe_layer({"rows": rows})


def test_memory_is_that_of_the_tensors():
    def call():
        kept = torch.ones(1000)
        torch.ones(3000).add_(kept[0])  # freed before the next
        return kept + torch.ones(1000)

    bytes_of_floats = 4 * (1000 + 3000)
    assert bytes_of_floats <= peak_bytes(call, cuda=False) <= bytes_of_floats + 1000


def test_time_goes_to_the_phase_of_the_caller():
    x, w = torch.randn(64, 32), torch.randn(32, 32)

    def call():
        with record_function(ROUTING):
            (x @ w).sort()
        return torch.addmm(w[0], x, w).index_select(0, torch.arange(64)).sum(0)

    times = time_by_phase(call, repeats=2, cuda=False)
    assert set(times) == {"routing", "dispatch", "experts", "combine", "other"}
    assert all(time > 0 for phase, time in times.items() if phase != "other")
    without = time_by_phase(lambda: (x @ w).sort(), repeats=2, cuda=False)
    assert without["routing"] == 0 < without["dispatch"] and without["experts"] > 0


@pytest.mark.slow
def test_draws_the_ratios(result):
    assert result[2].stat().st_size > 10_000


def test_wrong_arguments_are_explained(capsys):
    with pytest.raises(SystemExit):
        moe_layer.main(["--measure", "router"])
    assert "choose from" in capsys.readouterr().err
