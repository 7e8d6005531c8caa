"""Command line of the photo sets."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ...console import command, program
from ..catalog import dataset_root
from .coco import build_coco
from .sets import NAMES, PhotosError, coco_ids, is_there, layout, numbers, place, verify
from .voc import build_voc, voc_ids

DESCRIPTION = """
Puts the photo sets of configs/pretrain/nano_photos.py under photos/ of the data root, each as
train.json, val.json (COCO JSON) and images/.

coco is made of COCO 2017 by the ids that the package lists: from coco/ of the data root as far as
it is there, else from images.cocodataset.org (annotations 241 MB, 583 photos). groceries and
animals25 are made of checkouts of the repositories that publish them. airport_debris is looked for
only. What is missing is said with where it comes from. An interrupted run goes on.
"""

EXAMPLES = """
examples
  %(prog)s --sets coco
  %(prog)s --sets groceries --checkout groceries-object-detection-dataset
  %(prog)s --from /mnt/photos          # links
  %(prog)s --from /mnt/photos --copy

Exit status: 0 if all the sets that were asked for are there and whole."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program(),
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sets", nargs="+", choices=NAMES, default=list(NAMES), metavar="SET",
        help=f"which: {', '.join(NAMES)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FOLDER",
        help="a folder that already holds SET/train.json, SET/val.json, SET/images/",
    )
    parser.add_argument(
        "--checkout",
        type=Path,
        metavar="FOLDER",
        help="of the repository of the one set that --sets names, groceries or animals25",
    )
    parser.add_argument("--copy", action="store_true", help="copy from FOLDER, don't link to it")
    parser.add_argument(
        "--out", type=Path, help="data root (default: $DETECTRON2_DATASETS, else datasets)"
    )
    args = parser.parse_args(arguments)
    if args.checkout and (len(args.sets) > 1 or args.sets[0] not in voc_ids()):
        parser.error(f"--checkout is of one set: add --sets {' or --sets '.join(voc_ids())}")
    return args


@command
def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    root = args.out or dataset_root()
    failed = False
    for name in args.sets:
        try:
            _provide(name, root, args)
            print(f"{name}: {numbers(verify(name, root / 'photos' / name))}", flush=True)
        except (PhotosError, OSError, ValueError) as error:
            failed = True
            print(f"error: {name}: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on from here.", file=sys.stderr)
            return 130
    return int(failed)


def _provide(name: str, root: Path, args: argparse.Namespace) -> None:
    """Brings a set to its place if it isn't there."""
    target = root / "photos" / name
    if is_there(target):
        return
    if args.source is not None:
        verify(name, args.source / name)
        place(name, args.source / name, target, args.copy)
    elif args.checkout is not None:
        build_voc(name, args.checkout, target, voc_ids()[name])
    elif name == "coco":
        build_coco(root, coco_ids())
    else:
        made = " Clone it, and give the clone as --checkout FOLDER." if name in voc_ids() else ""
        raise PhotosError(f"not in {target}. Its photos have to be brought.{made}\n{layout(name)}")
