"""The command line of the analysis."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..console import command, program
from ..serving.shipped import DEFAULT_MIXTURE

DESCRIPTION = """
What the experts of a model do: a report as one HTML file, every figure also as PNG, its numbers as
CSV.

Load, partners (co-selection) and entropies of every MoE layer; AP of every expert on small,
occluded and rare objects; which names prefer which experts; photos with queries and their experts.
With --drop, what is lost without an expert; with --against, photos where two models differ most;
with several data sets, whether the same experts work together on each; with several runs, mean and
spread, and curves over training.
"""

EXAMPLES = """
examples
  %(prog)s --dataset stamps_val --dataset stamps_val_real \\
      --against nano-dense
  %(prog)s --config-file configs/moe_tuning/dynamic_dino_x16_top2.py \\
      --weights model_final.pth --dataset lvis_v1_minival --names 40 --max-images 500
  %(prog)s --config-file configs/moe_tuning/dynamic_dino_x16_top2.py \\
      --weights model_final.pth --dataset coco_2017_val --dataset lvis_v1_minival --pool odinw13
  %(prog)s --run output/seed0 --run output/seed1 --run output/seed2 --drop
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program(),
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--model", default=DEFAULT_MIXTURE, help="a shipped model (default: %(default)s)"
    )
    which.add_argument("--config-file", metavar="FILE", help="the recipe of a model of your own")
    which.add_argument(
        "--run",
        action="append",
        metavar="FOLDER",
        type=Path,
        help="train.output_dir of a run, its last checkpoint; several times: runs side by side",
    )
    parser.add_argument("--weights", metavar="FILE", help="checkpoint; default: the shipped one")
    parser.add_argument(
        "--against",
        nargs="+",
        metavar=("MODEL", "WEIGHTS"),
        help="the model before: a shipped one, a run's folder, or a recipe and its weights",
    )
    parser.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="NAME",
        help="registered data set; several times: is it the same on each? (default: the first that "
        "the recipe tests on)",
    )
    parser.add_argument(
        "--pool",
        action="append",
        default=[],
        metavar="SETS",
        help="data sets that count as one, beside those of --dataset: odinw13, odinw35, or "
        "TITLE=NAME,NAME,...; of several pools there are several",
    )
    parser.add_argument(
        "--max-images", type=_positive, metavar="N", help="evenly spread over the set"
    )
    parser.add_argument(
        "--names",
        type=_names,
        metavar="N",
        help="names that an image is asked for, those that it shows and others, or 'all' (default: "
        "as the recipe evaluates this data set, or all)",
    )
    parser.add_argument(
        "--drop",
        nargs="?",
        const="last",
        choices=("last", "all"),
        help="evaluate without one expert at a time: of the last layer, or of all",
    )
    parser.add_argument(
        "--drop-images", type=_positive, default=200, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--batch-size", type=_positive, default=8, help="default: %(default)s")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--output", default="output/analysis", metavar="FOLDER", help="default: %(default)s"
    )
    args = parser.parse_args(arguments)
    if args.against and len(args.against) > 2:
        parser.error("--against takes a model, and its weights if it is a recipe")
    if args.run and args.weights:
        parser.error("--weights goes with --model or --config-file: a run has its own")
    args.parser = parser
    return args


@command
def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    # Imported late, so that --help and wrong arguments answer at once.
    from ..files import writable_folder
    from .pooled import check_pools
    from .study import Options, StudiedModel, analyse

    try:
        writable_folder(args.output, "choose another folder with --output")
        if args.run:
            titles = _titles(args.run)
            studied = [
                StudiedModel(title, str(run), run=run)
                for title, run in zip(titles, args.run, strict=True)
            ]
        else:
            model = args.config_file or args.model
            studied = [StudiedModel(Path(model).stem, model, args.weights)]
        against = None
        if args.against:
            model, weights = (*args.against, None)[:2]
            against = StudiedModel(Path(model).stem, model, weights)
        options = Options(
            args.dataset,
            check_pools(args.pool, args.dataset),
            against,
            args.max_images,
            args.names,
            args.drop,
            args.drop_images,
            args.batch_size,
            args.device,
        )
        page = analyse(studied, options, args.output)
    except (ValueError, OSError) as error:
        args.parser.error(str(error))
    print(f"Report: {page}")
    return 0


def _titles(runs: Sequence[Path]) -> list[str]:
    """The names of the folders; where they are the same, whole paths."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _names(text: str) -> str | int:
    return text if text == "all" else _positive(text)
