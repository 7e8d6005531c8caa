"""`python -m dynamic_dino.analysis` from the recipe to the page, with every kind of router."""

import csv
import json
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig
from dynamic_dino.analysis.cli import main
from dynamic_dino.analysis.figure import slug
from helpers.pages import check_in_browser, check_page


@pytest.fixture
def run_of(tiny, tmp_path):
    """run_of("name", recipe, ...) -> the folder of a run with random weights and a log."""

    def build(name: str, recipe: str, *overrides: str) -> Path:
        model, cfg = tiny(recipe, *overrides)
        folder = tmp_path / name
        folder.mkdir()
        LazyConfig.save(cfg, str(folder / "config.yaml"))
        torch.save({"model": model.state_dict()}, folder / "model_final.pth")
        (folder / "last_checkpoint").write_text("model_final.pth")
        rows = [{"iteration": i, "moe/layer0/load_entropy": 1 - i / 9} for i in range(3)]
        (folder / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
        return folder

    return build


def table(file: Path) -> list[dict]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.slow
def test_one_model(drawn, run_of, tmp_path, capsys):
    x4 = ("moe_tuning/nano_x16_drawn.py", "model.decoder.layer.ffn.router.num_experts=4")
    run, dense = run_of("x4", *x4), run_of("dense", "pretrain/nano_drawn.py")
    output = tmp_path / "report"
    arguments = ["--run", run, "--against", dense, "--drop", "--drop-images", "2"]
    arguments += ["--dataset", "drawn_val", "--output", output]
    assert main(list(map(str, arguments))) == 0
    assert f"Report: {output}/report.html" in capsys.readouterr().out
    page = check_page((output / "report.html").read_text())
    figures = {file.stem for file in output.glob("*.png")}
    assert {"load", "coselection", "partners", "entropy", "tokens", "training"} <= figures
    assert {"experts-figure", "drop"} <= figures  # random weights may not find an object
    assert {file.stem for file in output.glob("*.csv")} >= figures | {"experts"}
    assert figures <= set(page.ids) and len(page.images) == len(figures)
    experts = table(output / "experts.csv")
    assert [row["expert"] for row in experts] == ["all", "0", "1", "2", "3"]
    assert sum(float(row["load"]) for row in experts[1:]) == pytest.approx(1)
    assert sorted(row["dropped"] for row in table(output / "drop.csv")) == ["0", "1", "2", "3"]
    numbers = json.loads((output / "numbers.json").read_text())["drawn_val"]["x4"]
    assert 0 <= numbers["AP"] <= 100 and "decoder 2: effective partners" in numbers
    check_in_browser(output / "report.html", page.images)


@pytest.mark.slow
def test_several_runs_on_two_data_sets(drawn, run_of, tmp_path):
    """HI-MoE and DynMoE, on the same pictures under two names: a file of annotations has none."""
    himoe = run_of(
        "himoe",
        "himoe/nano_x16_drawn.py",
        "model.decoder.layer.ffn.router.num_experts=4",
        "model.decoder.num_layers=2",
    )
    dynmoe = run_of("dynmoe", "dynmoe/nano_drawn.py", "model.decoder.num_layers=2")
    for name in ("val.json", "again.json"):
        content = (drawn / "drawn/annotations/val.json").read_text()
        (drawn / "drawn/val" / name).write_text(content)
    sets = [str(drawn / "drawn/val" / name) for name in ("val.json", "again.json")]
    output = tmp_path / "report"
    arguments = ["--run", str(himoe), "--run", str(dynmoe), "--max-images", "3"]
    arguments += ["--dataset", sets[0], "--dataset", sets[1], "--output", str(output)]
    arguments += ["--pool", f"both={sets[0]},{sets[1]}"]
    assert main(arguments) == 0
    ids = set(check_page((output / "report.html").read_text()).ids)
    first, second = (slug(name) for name in sets)
    rows = table(output / f"{slug('himoe', sets[0])}_experts.csv")
    assert {"scene route", "its share"} <= rows[0].keys() and len(rows) == 5
    assert any(row["scene route"] for row in rows[1:])
    for name in ("experts-per-token", "activation-frequency", "similarity", "thresholds",
                 "shared-experts"):  # fmt: skip
        assert f"dynmoe_{second}_{name}" in ids and f"himoe_{second}_{name}" not in ids
    assert {f"{first}_runs", "himoe_stability", "dynmoe_stability", "training"} <= ids
    assert f"{first}_load-of-runs" not in ids  # 4 experts, and 8
    runs = table(output / f"{first}_runs.csv")
    assert runs[0].keys() == {"", "himoe", "dynmoe", "mean", "spread"}
    stable = table(output / "himoe_stability.csv")
    assert [float(row["correlation"]) for row in stable] == pytest.approx([1] * 6)
    assert {row["other"] for row in stable} == {sets[1], "both"}
    whole, part = (
        [int(row["tokens"]) for row in table(output / f"himoe_{name}_load.csv")]
        for name in ("both", first)
    )
    assert whole == [2 * tokens for tokens in part]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "nano-dense"], "nano-dense has no MoE layer"),
        (["--dataset", "nowhere"], "unknown data set 'nowhere'"),
        (["--against", "nano-denes"], "did you mean 'nano-dense'?"),
        (["--run", "none/such"], "unknown model 'none/such'"),
        (["--pool", "mine=one"], "a title and two or more data sets"),
        (["--pool", "a=b,c", "--pool", "a=d,e"], "a title of its own"),
        (["--pool", "a=nowhere,other"], "unknown data set 'nowhere'"),
        (["--names", "0"], "'0' is not a positive number"),
        (["--against", "a", "b", "c"], "--against takes a model"),
        (["--run", "x", "--weights", "y"], "a run has its own"),
    ],
)
def test_mistakes(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*arguments, "--output", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
