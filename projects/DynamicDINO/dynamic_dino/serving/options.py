"""The options that every command that detects has: which model, on what, and what is kept.

Imports nothing heavy, so that `--help` and wrong arguments answer at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .shipped import DEFAULT_MODEL


def add_model_options(p: argparse.ArgumentParser) -> None:
    """Which model, and how it runs; `make_detector` makes it."""
    which = p.add_mutually_exclusive_group()
    which.add_argument(
        "--model", default=DEFAULT_MODEL, help="a shipped model (default: %(default)s)"
    )
    which.add_argument("--config-file", metavar="FILE", help="the recipe of a model of your own")
    p.add_argument(
        "--weights",
        metavar="FILE",
        help="checkpoint, or hf:OWNER/NAME or hf:DIRECTORY, public weights of Grounding DINO "
        "(default: the shipped model's)",
    )
    p.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    p.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "float16", "bfloat16"),
        help="of the weights (default: float32); float16 is the fastest on a GPU",
    )
    p.add_argument(
        "--accelerate",
        default="eager",
        choices=("eager", "graph", "compile"),
        help="CUDA graphs, or torch.compile, for many images of one size (default: eager)",
    )
    p.add_argument(
        "--pack",
        default="auto",
        choices=("auto", "always", "never"),
        help="weights packed for oneDNN, on a CPU (default: where that is measured to be faster)",
    )


def add_tile_options(p: argparse.ArgumentParser) -> None:
    """How large images are looked at; `make_detector` takes them."""
    p.add_argument(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="look at each image in square tiles of this side too, such as 640: finds small things "
        "in huge images, and takes as many times longer as there are tiles (default: not)",
    )
    p.add_argument(
        "--overlap",
        type=float,
        default=0.2,
        help="of neighbouring tiles, as a part of their side; things that are smaller than it are "
        "whole in one of them (default: %(default)s)",
    )


def add_detection_options(p: argparse.ArgumentParser) -> None:
    """Which of its detections are kept; `check_numbers` refuses what can't be."""
    p.add_argument(
        "--threshold",
        type=float,
        help="lowest score that is shown (default: what suits the shipped model; 0.2 for others)",
    )
    p.add_argument(
        "--max-detections",
        type=int,
        metavar="N",
        help="per image (default: the recipe's model.max_detections)",
    )
    p.add_argument(
        "--nms",
        type=float,
        metavar="IOU",
        help="of boxes of one phrase that overlap more than this, such as 0.7, keep the best "
        "(default: a shipped model's own, else keep all)",
    )
    p.add_argument("--nms-agnostic", action="store_true", help="--nms whatever the phrases are")


def check_numbers(args: argparse.Namespace) -> None:
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold:g} is not between 0 and 1")
    if args.nms is not None and not 0 <= args.nms <= 1:
        raise ValueError(f"--nms {args.nms:g} is not between 0 and 1")
    if args.nms_agnostic and args.nms is None:
        raise ValueError("--nms-agnostic needs --nms, such as --nms 0.7")
    if args.max_detections is not None and args.max_detections < 1:
        raise ValueError(f"--max-detections {args.max_detections} is less than 1")


def named(args: argparse.Namespace) -> str:
    """What runs, in words: public weights without a recipe are a model of their own."""
    public = args.weights if (args.weights or "").startswith("hf:") else None
    return args.config_file or public or args.model


def public_name(args: argparse.Namespace) -> str:
    """`named` for the clients of a server, whom its folders don't concern."""
    name = named(args)
    of_hub = name.startswith("hf:") and not Path(name[3:]).is_dir()
    return name if of_hub else Path(name).absolute().name


def make_detector(args: argparse.Namespace):
    from ..engine.allocator import keep_freed_memory
    from .inference import load_detector
    from .tiling import TiledDetector

    keep_freed_memory()
    detector = load_detector(
        args.config_file or args.model,
        args.weights,
        args.device,
        args.threshold,
        args.dtype,
        args.accelerate,
        args.pack,
    )
    tile = getattr(args, "tile", None)  # not every command has it
    return detector if tile is None else TiledDetector(detector, tile, args.overlap)
