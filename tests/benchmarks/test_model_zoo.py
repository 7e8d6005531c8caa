"""The shipped models are evaluated and timed, here on a few drawn shapes."""

import json
from pathlib import Path

import model_zoo
import pytest
from dynamic_dino.data.datasets import register_builtin
from dynamic_dino.data.synthetic.drawn import write_drawn_dataset
from dynamic_dino.serving.shipped import SHIPPED_MODELS
from helpers.scripts import run_script
from lib import tables as results

ROOT = Path(__file__).parents[2]


@pytest.fixture
def drawn(tmp_path):
    write_drawn_dataset(tmp_path, num_images=3, split="val")
    register_builtin(tmp_path)
    yield
    register_builtin()


@pytest.mark.slow
def test_evaluates_and_times_what_is_shipped(drawn, tmp_path):
    overrides = [
        f"dataloader.{key}=drawn_val"
        for name in ("val", "val_novel", "val_real")
        for key in (
            f"test.{name}.dataset.names",
            f"test.{name}.mapper.dataset",
            f"evaluator.{name}.dataset_name",
        )
    ]
    output = tmp_path / "zoo.json"
    arguments = ["--device", "cpu", "--repeats", "2", "--json", output]
    text = run_script(model_zoo.main, *arguments, *overrides)
    report = json.loads(output.read_text())
    assert list(report["models"]) == list(SHIPPED_MODELS)
    dense, experts = report["models"].values()
    assert dense["parameters"]["active"] == dense["parameters"]["total"]
    assert experts["parameters"]["active"] < experts["parameters"]["total"]
    for model in (dense, experts):
        assert 0 <= model["scores"]["val/AP50"] <= 100 and model["times"]["median_ms"] > 0
        assert (ROOT / model["config"]).is_file()
    assert results.model_zoo(report) in text


def test_the_model_cards_name_every_shipped_model():
    cards = results.CARDS.read_text()
    for name, shipped in SHIPPED_MODELS.items():
        assert name in cards and f"configs/{shipped.config}" in cards
