#!/usr/bin/env python
"""Trains or evaluates a detector by a LazyConfig recipe; see --help."""

from __future__ import annotations

import argparse
from pathlib import Path

from dynamic_dino.config import ConfigError, load_config
from dynamic_dino.engine.evaluate import do_test, load_for_evaluation
from dynamic_dino.engine.launch import argument_parser, launch
from dynamic_dino.engine.setup import setup
from dynamic_dino.engine.train import do_train
from dynamic_dino.engine.trainer import NonFiniteLossError

DEFAULT_CONFIG = Path(__file__).parents[2] / "configs/moe_tuning/dynamic_dino_x16_top2.py"


def main(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file, args.opts, args.model)
    setup(cfg)
    if args.eval_only:
        do_test(cfg, load_for_evaluation(cfg, args.resume))
    else:
        do_train(cfg, args.resume)


if __name__ == "__main__":
    parser = argument_parser(DEFAULT_CONFIG)
    args = parser.parse_args()
    if args.model and not args.eval_only:
        parser.error(
            "--model goes with --eval-only; to train a model on other data, write a recipe"
        )
    try:
        load_config(
            args.config_file, args.opts, args.model
        )  # a mistake is reported once, not by every process
        launch(main, args)
    except ConfigError as error:
        parser.error(str(error))
    except NonFiniteLossError as error:
        raise SystemExit(f"{parser.prog}: error: {error}") from None
