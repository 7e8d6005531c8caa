"""The notebooks run from top to bottom, at a tiny size, and were saved as they are."""

import json

import matplotlib.pyplot as plt
import pytest
from dynamic_dino.data.datasets import register_builtin
from helpers.documentation import PROJECT

NOTEBOOKS = sorted((PROJECT / "docs/notebooks").glob("*.ipynb"))
TINY = {
    "STEPS = 60": "STEPS = 2",
    "num_images=48": "num_images=4",
    "num_images=16": "num_images=4",
}


@pytest.fixture
def builtin_sets():
    yield
    register_builtin()
    plt.close("all")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive:UserWarning")
def test_notebook_runs(path, builtin_sets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    names = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            for size, tiny in TINY.items():
                code = code.replace(size, tiny)
            exec(compile(code, f"{path.name}, cell {number}", "exec"), names)
    if "STEPS" in names:
        assert names["STEPS"] == 2 and len(names["batch"]) == 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_was_saved_small_and_whole(path):
    assert path.stat().st_size < 250_000
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        outputs = cell.get("outputs", [])
        assert not any(o["output_type"] == "error" or o.get("name") == "stderr" for o in outputs)
