"""Run in engine/test_distributed.py: whole runs, interrupted ones, and a poisoned one."""

import argparse
import json
from contextlib import suppress
from pathlib import Path

import torch
from detectron2.utils import comm
from dynamic_dino.config import load_config
from dynamic_dino.engine.evaluate import evaluate_weights
from dynamic_dino.engine.preemption import Preempted, noted_signals
from dynamic_dino.engine.setup import setup
from dynamic_dino.engine.train import do_train
from dynamic_dino.engine.trainer import NonFiniteLossError

from . import accumulation

RECIPE = Path(__file__).with_name("tiny_recipe.py")
ADAPTIVE = Path(__file__).with_name("adaptive_recipe.py")
ACCUMULATED = {
    "at once": (1, {}),
    "two parts": (2, {}),
    "one by one": (4, {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-4}),
    "static": (2, {"static_graph": True}),
}


def survive(args: argparse.Namespace) -> None:
    """The run "random" in the folder "killed": one process is killed in its first attempt."""
    folder = f"train.output_dir={args.output / 'killed'}"
    cfg = load_config(RECIPE, [*args.opts, folder, "dataloader.train.kill_at=6"])
    setup(cfg)
    do_train(cfg, resume=True)


def main(args: argparse.Namespace) -> None:
    def train(folder: str, *overrides: str, resume: bool = False, recipe: Path = RECIPE):
        output = args.output / folder
        cfg = load_config(recipe, [*args.opts, f"train.output_dir={output}", *overrides])
        setup(cfg)
        return do_train(cfg, resume)

    weights = {
        name: accumulation.train(args.seed, accumulate, **ddp)
        for name, (accumulate, ddp) in ACCUMULATED.items()
    }
    torch.save(weights, args.output / f"accumulated{comm.get_rank()}.pth")

    train("random")
    with suppress(InterruptedError):
        train("cut", "dataloader.train.stop_at=6")
    train("cut", resume=True)
    try:
        train("poisoned", f"model.poison={args.poison}")
    except NonFiniteLossError as error:
        (args.output / f"error{comm.get_rank()}.txt").write_text(str(error))

    batch = ["model.norm=batch", "train.log_period=2"]  # whose statistics each rank has of its own
    model = train("norms", *batch)
    torch.save(model.state_dict(), args.output / f"norms{comm.get_rank()}.pth")
    with noted_signals(), suppress(Preempted):
        train("norms_cut", *batch, "dataloader.train.ask_at=6")
    train("norms_cut", *batch, resume=True)
    cfg = load_config(RECIPE, [*args.opts, f"train.output_dir={args.output / 'norms'}", *batch])
    if scores := evaluate_weights(cfg, resume=True):
        (args.output / "norms_file.json").write_text(json.dumps(scores))

    model = train("adaptive", "model.dropout=0", "model.noise=0", recipe=ADAPTIVE)
    torch.save(model.state_dict(), args.output / f"adaptive{comm.get_rank()}.pth")
    with suppress(InterruptedError):
        train("adaptive_cut", "dataloader.train.stop_at=10", recipe=ADAPTIVE)
    train("adaptive_cut", resume=True, recipe=ADAPTIVE)
    train("adaptive_random", recipe=ADAPTIVE)
