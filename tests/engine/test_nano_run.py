"""The whole job at its smallest: nano on drawn shapes, dense, then x16, killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dynamic_dino.config import ConfigError, load_config
from dynamic_dino.data.datasets import register_builtin
from dynamic_dino.data.synthetic.drawn import write_drawn_dataset
from dynamic_dino.engine.setup import setup
from dynamic_dino.engine.train import do_train
from dynamic_dino.engine.trainer import Trainer

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module", autouse=True)
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    write_drawn_dataset(root, 12, 96, seed=1, split="train")
    write_drawn_dataset(root, 4, 96, seed=2, split="val")
    register_builtin(root)
    yield
    register_builtin()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense checkpoint after two iterations."""
    output = tmp_path_factory.mktemp("dense")
    train("pretrain/nano_drawn.py", output, "train.max_iter=2")
    return output / "model_final.pth"


def train(config: str, output: Path, *overrides: str, resume: bool = False) -> list[dict]:
    """Runs a recipe; returns its metrics, one row an iteration."""
    cfg = load_config(
        CONFIGS / config,
        [
            f"train.output_dir={output}",
            "train.device=cpu",
            "train.log_period=1",
            "train.checkpointer.period=2",
            "dataloader.train.total_batch_size=2",
            *overrides,
        ],
    )
    setup(cfg)
    do_train(cfg, resume)
    rows = map(json.loads, (output / "metrics.json").read_text().splitlines())
    return [row for row in rows if "total_loss" in row]


def losses(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if "loss" in k or "moe/" in k} for row in rows]


@pytest.mark.slow
def test_moe_tuning_resumes_to_the_same_bits(dense, tmp_path, monkeypatch):
    recipe = ("moe_tuning/nano_x16_drawn.py", f"train.init_checkpoint={dense}", "train.max_iter=5")
    whole = train(recipe[0], tmp_path / "whole", *recipe[1:])
    assert len(whole) == 5
    assert whole[0]["moe/layer0/siblings"] == 1.0  # it starts as the dense model
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert {"val/AP50", "val/routing/layer2/siblings"} <= results.keys()

    step = Trainer.run_step

    def killed(self):
        if self.iter == 3:  # one iteration after the last checkpoint
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe[0], tmp_path / "killed", *recipe[1:])
    resumed = train(recipe[0], tmp_path / "killed", *recipe[1:], resume=True)
    assert losses(resumed) == losses(whole)


@pytest.mark.slow
def test_closed_set_dense_then_himoe(tmp_path):
    small = ("model.enhancer.num_layers=1", "model.decoder.num_layers=1")
    rows = train("pretrain/dino_nano_drawn.py", tmp_path / "dense", *small, "train.max_iter=2")
    assert {"loss_class_dn", "loss_giou_selection"} <= rows[0].keys()
    start = f"train.init_checkpoint={tmp_path / 'dense' / 'model_final.pth'}"
    options = (*small, start, "train.max_iter=1")
    rows = train("himoe/dino_nano_drawn.py", tmp_path / "himoe", *options)
    assert {"loss_squared_balance", "moe/layer0/scene_entropy"} <= rows[0].keys()
    for run in ("dense", "himoe"):
        results = json.loads((tmp_path / run / "results.json").read_text())
        assert "val/AP50" in results
        of_set = json.loads((tmp_path / run / "evaluation/val/results.json").read_text())
        assert all(of_set[key] == results[key] for key in ("weights", "iteration"))
    assert "val/routing/layer0/load_entropy" in results


@pytest.mark.slow
def test_mistakes_end_with_their_message_alone(dense, tmp_path):
    recipe, output = "moe_tuning/nano_x16_drawn.py", tmp_path / "run"
    for override, message in (
        ("model.decoder.layer.ffn.router.top_k=3", "num_experts=16 is not a multiple of top_k=3"),
        ("model.decoder.num_layers=2", "is of another architecture than this config"),
        ("train.init_checkpoint=nowhere.pth", "checkpoint nowhere.pth doesn't exist"),
        ("train.init_except=[fnn.*]", "nothing of the model matches 'fnn.*'"),
        ("dataloader.train.dataset.names=nowhere.json", "nowhere.json"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(recipe, output, f"train.init_checkpoint={dense}", override)
