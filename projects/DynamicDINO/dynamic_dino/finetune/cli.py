"""The command `finetune.py`, or `dynamic-dino-finetune`: your own data, end to end."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ..console import command, program
from ..files import DiskFullError
from ..remote import address
from . import rule

DESCRIPTION = """\
Fine-tunes a detector on your own photos with boxes, end to end: checks them, splits off a fifth for
validation where there is none, chooses what to tune and for how long, tunes it, and shows what it
has brought: AP before and after with intervals, each name, pictures of the largest gains and
losses, and the line that runs the new detector.
"""
EXAMPLES = """\
examples:
  %(prog)s mine/                                     a folder, in the format of whatever tool
  %(prog)s annotations.json --images photos/         where the photos are elsewhere
  %(prog)s data.train_json=a.json data.val_json=b.json
  %(prog)s mine/ --output output/mine --epochs 20
  %(prog)s mine/ --experts --control                 16 experts, and the dense model for as long
  %(prog)s mine/ --start output/finetune/mine/tuned --experts --output output/mine_x16
  %(prog)s mine/ --start hf:gdino-tiny               public weights in a folder
  %(prog)s mine/ optimizer.lr=1e-4 train.seed=1      anything of the recipe
  %(prog)s mine/ --resume                            goes on after an interruption

DATA is a file or folder of COCO, Pascal VOC, YOLO, LabelMe, CVAT, Label Studio, Roboflow or CSV.
Its names are the phrases that are learnt: let them read like English. Five photos suffice to try
it. Photos are mirrored, and asked for with another prompt each time, but not augmented otherwise:
so the features of the frozen backbone are computed once, and a step takes half the time. Where you
know that more helps: --no-cache 'dataloader.train.mapper.augmentations=[...]'.

the rule:
"""
OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def parser() -> argparse.ArgumentParser:
    told = (rule.__doc__ or "").partition("\n\n")[2].strip()
    p = argparse.ArgumentParser(
        prog=program(),
        description=DESCRIPTION,
        epilog=EXAMPLES + re.sub(r"^(?=.)", "  ", told, flags=re.M),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "data",
        metavar="DATA",
        nargs="?",
        help="file or folder; its parts train and val count. Or both by themselves: "
        "data.train_json=... data.val_json=..., built-in names too",
    )
    p.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of the recipe, as in train_net.py"
    )
    p.add_argument("--images", metavar="FOLDER", help="where the photos are (default: with DATA)")
    p.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: output/finetune/NAME_OF_DATA"
    )
    p.add_argument(
        "--start",
        metavar="MODEL",
        help="a shipped model, hf:OWNER/NAME, hf:DIRECTORY, or the folder of a run (default: the "
        "shipped dense nano on a CPU, hf:IDEA-Research/grounding-dino-tiny on a GPU)",
    )
    length = p.add_mutually_exclusive_group()
    length.add_argument("--iterations", type=_positive(int), metavar="N", help="default: the rule")
    length.add_argument(
        "--epochs", type=_positive(float), metavar="N", help="passes over the photos, instead"
    )
    p.add_argument(
        "--experts",
        action="store_true",
        help="MoE-Tuning: each FFN of the decoder becomes 16 experts, of which 2 are active",
    )
    p.add_argument(
        "--control",
        action="store_true",
        help="with --experts: also the dense model for as long, with the same parts free",
    )
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    p.add_argument(
        "--no-cache", action="store_true", help="compute the backbone's features in each step"
    )
    p.add_argument(
        "--resume", action="store_true", help="go on where the same command was interrupted"
    )
    return p


def _positive(kind: type) -> type:
    def read(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    read.__name__ = f"positive {'number' if kind is float else 'whole number'}"
    return read


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 2 where something was wrong, 1 for a loss that diverged or a
    full disk; a signal while it trains or scores ends it with `preemption.EXIT_CODE`."""
    p = parser()
    # Overrides may stand anywhere, which argparse doesn't allow.
    words = list(sys.argv[1:] if argv is None else argv)
    overrides = [word for word in words if OVERRIDE.match(word)]
    args = p.parse_args([word for word in words if word not in overrides])
    if args.control and not args.experts:
        p.error("--control is the control of --experts: give both, or none")
    if args.data is None:
        given = dict(override.split("=", 1) for override in overrides)
        if not {"data.train_json", "data.val_json"} <= given.keys():
            p.error(
                "name DATA, a file or folder, or both data.train_json=... and data.val_json=..."
            )
        args.data = given["data.train_json"]  # for the name of the output; both are overridden
    if address(args.output or ""):
        p.error(f"--output {args.output}: a folder of this machine; train_net.py takes addresses")
    # Imported late, so that --help and wrong arguments answer at once.
    from ..config import ConfigError
    from ..data.workers import WorkerEndedError
    from ..engine.allocator import keep_freed_memory
    from ..engine.trainer import NonFiniteLossError
    from .run import Options, finetune

    keep_freed_memory()
    images = [f"data.{part}_images={args.images}" for part in ("train", "val") if args.images]
    options = Options(
        data=args.data,
        output=args.output or default_output(args.data),
        start=args.start,
        kinds=(("x16", "control") if args.control else ("x16",)) if args.experts else ("tuned",),
        iterations=args.iterations,
        epochs=args.epochs,
        device=args.device,
        cache=not args.no_cache,
        resume=args.resume,
        overrides=(*images, *overrides),
    )
    try:
        finetune(options)
    except (ConfigError, NonFiniteLossError, DiskFullError, WorkerEndedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume goes on", file=sys.stderr)
        return 130
    return 0


def default_output(data: str) -> Path:
    """output/finetune/ and the data's name; a part's is "mine_train"."""
    path = Path(data)
    name = path.resolve().stem if path.suffix else path.resolve().name
    return Path("output/finetune") / re.sub(r"\W+", "_", name).strip("_")
