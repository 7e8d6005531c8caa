"""Run by torchrun in test_distributed.py: a whole run, an interrupted one, and a poisoned one."""

import argparse
from contextlib import suppress
from pathlib import Path

from detectron2.utils import comm
from dynamic_dino.engine.config import load_config
from dynamic_dino.engine.launch import launch
from dynamic_dino.engine.setup import setup
from dynamic_dino.engine.train import do_train
from dynamic_dino.engine.trainer import NonFiniteLossError

RECIPE = Path(__file__).with_name("tiny_recipe.py")


def main(args: argparse.Namespace) -> None:
    def train(folder: str, *overrides: str, resume: bool = False) -> None:
        output = args.output / folder
        cfg = load_config(RECIPE, [*args.opts, f"train.output_dir={output}", *overrides])
        setup(cfg)
        do_train(cfg, resume)

    train("whole", "model.dropout=0", "model.noise=0")
    train("random")
    with suppress(InterruptedError):
        train("cut", "dataloader.train.stop_at=6")
    train("cut", resume=True)
    try:
        train("poisoned", f"model.poison={args.poison}")
    except NonFiniteLossError as error:
        (args.output / f"error{comm.get_rank()}.txt").write_text(str(error))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("poison")
    launch(main, parser.parse_args(namespace=argparse.Namespace(num_gpus=0, opts=[])))
