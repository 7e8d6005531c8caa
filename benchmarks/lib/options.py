"""Command-line options that the benchmarks share: the machine, the clock, where results go."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lib.interleaved import CLOCKS
from lib.provenance import results_folder


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of the script, line by line."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    """--device and --threads."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=0, help="of a CPU (default: as torch says)")


def use_threads(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)


def add_clock(parser: argparse.ArgumentParser) -> None:
    """--clock, one of `CLOCKS`."""
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="process: CPU time of all threads, where others use the machine (default: wall)",
    )


def check_clock(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.device == "cuda" and options.clock != "wall":
        parser.error("--clock process: a GPU's time isn't the process's")


def add_output(parser: argparse.ArgumentParser, plot: bool = False) -> None:
    """--save and --json, and --plot for a benchmark that draws."""
    what = "--json and --plot" if plot else "--json"
    parser.add_argument(
        "--save", action="store_true", help=f"{what} in benchmarks/results/<machine>/"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    if plot:
        parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there")


def place_output(options: argparse.Namespace, name: str) -> None:
    """Where --save puts what: `name`.json, and `name`.png for a benchmark that draws."""
    if options.save:
        folder = results_folder(getattr(options, "device", "cpu"))
        options.json = options.json or folder / f"{name}.json"
        if "plot" in options:
            options.plot = options.plot or folder / f"{name}.png"


def image_size(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH in pixels, such as 640x640."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 640x640")
    return int(height), int(width)
