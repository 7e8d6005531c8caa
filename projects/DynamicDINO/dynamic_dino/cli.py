"""The command ``dynamic-dino``: one name for all programs of the package.

Imports nothing but the program that is asked for, so that ``--help`` answers at once.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from .console import called_as, command


class Program(NamedTuple):
    """module  below this package; its ``main`` takes the arguments
    does    in a line
    before  arguments that stand before the user's
    """

    module: str
    does: str
    before: tuple[str, ...] = ()


PROGRAMS = {
    "predict": Program("serving.predict", "find what a text names, in images and videos"),
    "page": Program("page.cli", "the same on a web page of this machine"),
    "label": Program("label.cli", "label a folder of images"),
    "serve": Program("serve.cli", "serve a detector over HTTP"),
    "export": Program("export.cli", "export a detector to ONNX, OpenVINO, PyTorch or TensorRT"),
    "finetune": Program("finetune.cli", "fine-tune a detector on your own boxes"),
    "train": Program("engine.cli", "train or evaluate by a recipe"),
    "slurm": Program("engine.slurm", "submit that to Slurm, requeued until it is done"),
    "evaluate": Program("evaluation.cli", "score detections that are in a file"),
    "report": Program("analysis.cli", "report what the experts of a model do"),
    "list": Program("data.__main__", "list the built-in data sets", ("list",)),
    "check": Program("data.__main__", "find all that is wrong with a data set", ("check",)),
    "show": Program("data.__main__", "draw samples of a data set", ("show",)),
    "convert": Program("data.__main__", "convert a data set", ("convert",)),
    "shard": Program(
        "data.__main__", "pack a data set's images for storage at an address", ("shard",)
    ),
    "split": Program("data.__main__", "draw a validation part of a data set", ("split",)),
    "weights": Program(
        "checkpoint.__main__", "import public weights, export a checkpoint's, leave out experts"
    ),
    "stamps": Program("data.synthetic.stamps.cli", "make the data set Stamps"),
    "demo": Program("demo", "from a dense detector to experts in 20 minutes"),
    "install-detectron2": Program("install_detectron2", "install Detectron2, if there is none"),
}


def usage() -> str:
    width = max(map(len, PROGRAMS))
    lines = (f"  {name:{width}}  {program.does}" for name, program in PROGRAMS.items())
    return "\n".join(
        [
            "usage: dynamic-dino COMMAND ...",
            "",
            *lines,
            "",
            "dynamic-dino COMMAND --help says more.",
        ]
    )


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: the program's, or 2 for an unknown one."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        from dynamic_dino_kernels import __version__

        print(f"dynamic-dino {__version__}")
        return 0
    if name not in PROGRAMS:
        near = difflib.get_close_matches(name, PROGRAMS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "dynamic-dino --help lists them"
        print(f"error: there is no command {name!r}: {hint}", file=sys.stderr)
        return 2
    # The data's programs are commands of one parser, which adds their names.
    with called_as("dynamic-dino" if PROGRAMS[name].before else f"dynamic-dino {name}"):
        return run(name, arguments)


def run(name: str, arguments: Sequence[str]) -> int:
    program = PROGRAMS[name]
    module = import_module(f".{program.module}", __package__)
    return module.main([*program.before, *arguments]) or 0


# Commands of their own, which were there before the one for all.
@command
def train() -> int:
    return run("train", sys.argv[1:])


@command
def predict() -> int:
    return run("predict", sys.argv[1:])


@command
def finetune() -> int:
    return run("finetune", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
