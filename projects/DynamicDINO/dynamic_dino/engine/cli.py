"""The command `train_net.py`, or `dynamic-dino-train`: trains or evaluates by a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..config import ConfigError, load_config, variants_table
from ..console import command
from ..data.workers import WorkerEndedError
from ..files import DiskFullError, configs_folder
from ..remote import RemoteError
from .evaluate import evaluate_weights
from .launch import argument_parser, launch
from .preemption import noted_signals
from .setup import setup, sole_run
from .train import do_train
from .trainer import NonFiniteLossError

DEFAULT_RECIPE = "moe_tuning/dynamic_dino_x16_top2.py"


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Exits with status 2 and one line for a mistake in the recipe or the data, 1 for a loss that
    diverged, a full disk, storage that can't be reached or a worker that was killed, and
    `preemption.EXIT_CODE` where a signal ended it in good order."""
    parser, args = parse(argv)
    if args.variants:
        print(variants_table(configs_folder()), end="")
        return
    try:
        # Loaded here as well, so that a mistake is reported once, not by every process.
        load_config(args.config_file, args.opts, args.model)
        launch(run, args)
    except ConfigError as error:
        parser.error(str(error))
    except (NonFiniteLossError, DiskFullError, RemoteError, WorkerEndedError) as error:
        raise SystemExit(f"{parser.prog}: error: {error}") from None


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line, checked, with the variant in its `config_file`."""
    parser = argument_parser(configs_folder() / DEFAULT_RECIPE)
    args = parser.parse_args(argv)
    if args.model and not args.eval_only:
        parser.error(
            "--model goes with --eval-only; to train a model on other data, write a recipe"
        )
    if args.variant:
        recipe, colon, name = args.variant.rpartition(":")
        if colon and args.config_file != parser.get_default("config_file"):
            parser.error(f"--variant {args.variant} names its recipe: leave out --config-file")
        file = configs_folder() / f"{recipe}.py" if colon else args.config_file
        args.config_file = f"{file}:{name}"
    return parser, args


@command
def run(args: argparse.Namespace) -> None:
    """What each process does."""
    cfg = load_config(args.config_file, args.opts, args.model)
    new = not (args.resume or args.eval_only)
    with noted_signals(), sole_run(cfg.train.output_dir, new=new):
        setup(cfg, resume=args.resume and not args.eval_only)
        if args.eval_only:
            evaluate_weights(cfg, args.resume)
        else:
            do_train(cfg, args.resume)
