"""The benchmark of packed weights runs, and its file makes a table."""

import json

import packing
import pytest
from dynamic_dino_kernels.packing import obstacle
from lib import tables as results

pytestmark = pytest.mark.skipif(obstacle() != "", reason=obstacle() or "packs")
SMALL = "--tokens 30 --dim 16 --hidden 32 --experts 4 --layers 2 --repeats 2 --threads 1".split()


def test_all_candidates_compute_the_same(tmp_path, capsys):
    path = tmp_path / "new" / "packing.json"
    packing.main(["--measure", "layer", "bits", *SMALL, "--json", str(path)])
    report = json.loads(path.read_text())
    layer, bits = report["rows"]
    assert layer["part"] == "layer" and bits["part"] == "bits" and layer["threads"] == 1
    assert {"dense", "dense, packed", "experts", "experts, packed"} <= layer["results"].keys()
    for row in report["rows"]:
        for name, found in row["results"].items():
            assert 0 < found["low_us"] <= found["median_us"] <= found["high_us"]
            if name != "experts, cached":
                limit = 0.03 if "bfloat16" in name or "int8" in name else 1e-5
                assert found["error"] < limit, name
    table = results.packing(report)
    assert "| layer | threads | dense, ms |" in table and "T=30, x4-Top2, 16 -> 32" in table
    assert "experts, packed" in capsys.readouterr().out


def test_shapes_of_linear_layers():
    candidates = packing.linear(3, 5, 7)
    shapes = {name: tuple(run().shape) for name, run in candidates.items()}
    assert set(shapes.values()) == {(3, 7)} and list(shapes)[0] == "plain"
