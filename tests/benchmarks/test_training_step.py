"""The benchmark runs as a user starts it, with the nano recipe and few pixels."""

import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import training_step
from detectron2.config import instantiate
from dynamic_dino.config import load_config
from helpers.scripts import run_script

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "configs/moe_tuning"
KINDS = ["pre-training", "dense control", "MoE-Tuning, sequential", "MoE-Tuning, grouped"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "new" / "report.json"
    small = "--size 64 --batch 1 --names 3 --boxes 2 --repeats 2".split()
    recipe = ["--config-file", RECIPES / "nano_x16_stamps.py", "--device", "cpu"]
    text = run_script(training_step.main, *recipe, *small, "--json", path)
    return text, json.loads(path.read_text())


@pytest.mark.slow
def test_compares_all_kinds_of_step(result):
    rows = result[1]["rows"]
    assert [row["candidate"] for row in rows] == KINDS
    for row in rows:
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["speedup"] > 0 and "peak_mib" not in row
    assert rows[0]["speedup"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "kind"),
    [("nano_x16_stamps.py", KINDS[3]), ("nano_dense_control_stamps.py", KINDS[1])],
)
def test_trains_what_the_recipe_trains(result, recipe, kind):
    cfg = load_config(RECIPES / recipe)
    free = {
        name: p.numel()
        for name, p in instantiate(cfg.model).named_parameters()
        if p.requires_grad and any(fnmatchcase(name, pattern) for pattern in cfg.train.trainable)
    }
    row = next(row for row in result[1]["rows"] if row["candidate"] == kind)
    assert row["trained"] == sum(free.values()) < row["parameters"]


@pytest.mark.slow
def test_pre_training_frees_all_that_the_model_does(result):
    rows = result[1]["rows"]
    model = instantiate(load_config(ROOT / "configs/pretrain/nano_stamps.py").model)
    assert rows[0]["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_says_what_was_scaled_down_and_where_the_numbers_come_from(result):
    text, report = result
    assert "image side 64 (recipe: 320), batch 1 (recipe: 8), names 3 (recipe: 30)" in text
    assert "precision float32 (recipe: bfloat16)" in text and "MoE-Tuning, grouped" in text
    assert report["scale"]["batch"] == "1 (recipe: 8)"
    assert report["machine"] and report["versions"]["torch"]
    assert "--size 64" in report["command"] and report["settings"]["threads"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-file", RECIPES / "nano_dense_control_stamps.py"], "no mixture of experts"),
        (["model.decoder.nun_layers=1"], "did you mean model.decoder.num_layers"),
        (["--repeats", 1], "quartiles"),
    ],
)
def test_mistakes_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        training_step.main(["--device", "cpu", *map(str, arguments)])
    assert stop.value.code
    assert message in f"{stop.value.code} {capsys.readouterr().err}"
