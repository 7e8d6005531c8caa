"""DynMoE's experts come and go in the training loop, and an interruption changes nothing."""

from pathlib import Path

import pytest
import torch
from dynamic_dino.config import ConfigError, load_config
from dynamic_dino.engine.train import do_train

RECIPE = Path(__file__).parents[1] / "helpers/adaptive_recipe.py"


@pytest.fixture
def recipe(tmp_path):
    """As that of the tiny recipe."""
    return lambda folder, *overrides: load_config(
        RECIPE, [f"train.output_dir={tmp_path / folder}", *overrides]
    )


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.slow
def test_interrupted_run_equals_whole_run(recipe, metrics, tmp_path):
    """Cut in a window, at a change, and behind one; checkpoints are of iterations 3, 7, 11, ..."""
    do_train(recipe("whole"))
    rows = metrics("whole")
    removed, added = (rows[5][f"moe/layer0/{name}"] for name in ("removed", "added"))
    assert removed >= 1, "nobody reaches the threshold of expert 2"
    assert added == 1 and rows[6]["moe/experts"] == 4 - removed + added
    final = torch.load(tmp_path / "whole/model_final.pth")
    assert final["ema"]["weights"]["mixture.router.weight"].isfinite().all()
    for stop in (4, 8, 12, 16):
        with pytest.raises(InterruptedError):
            do_train(recipe(f"cut{stop}", f"dataloader.train.stop_at={stop}"))
        do_train(recipe(f"cut{stop}"), resume=True)
        assert metrics(f"cut{stop}") == rows
        assert same(torch.load(tmp_path / f"cut{stop}/model_final.pth"), final)


def test_period_and_window(recipe, metrics):
    cfg = recipe("late", "train.max_iter=6", "train.adaptive_experts.period=5")
    do_train(cfg)
    assert [i for i, row in metrics("late").items() if "moe/layer0/removed" in row] == [4]
    with pytest.raises(ConfigError, match="window=9 must lie between 1 and period=6"):
        do_train(recipe("wide", "train.adaptive_experts.window=9"))


def test_other_models_are_refused(tmp_path):
    cfg = load_config(
        RECIPE.with_name("tiny_recipe.py"),
        [f"train.output_dir={tmp_path}", "train.adaptive_experts.enabled=true"],
    )
    with pytest.raises(ConfigError, match="a MoE layer with a TopAnyRouter"):
        do_train(cfg)
