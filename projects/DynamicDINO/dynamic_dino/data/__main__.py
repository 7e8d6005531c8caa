"""Command line: list, check, show, convert, split and shard data sets."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from ..console import command, program
from ..modeling.text import quiet_transformers
from ..remote import address
from .builtin import BUILTIN
from .catalog import dataset_root
from .check import MAX_TOKENS, TOKENIZER, check_dataset
from .convert import convert_dataset, write_split
from .formats.recognise import TITLES
from .places import find_builtin, parts_named
from .shards import SHARD_MB, write_shards
from .show import draw_samples
from .split import VAL

EXAMPLES = """examples:
  %(prog)s list --all
  %(prog)s check objects365_v1_train gqa_train
  %(prog)s check mine/train.json --image-folder mine/images --images all
  %(prog)s show odinw_Raccoon_train --out raccoons.jpg
  %(prog)s convert gqa_train gqa.jsonl --to odvg
  %(prog)s check voc_or_yolo_or_labelme_folder
  %(prog)s convert roboflow_export:val val.json --to coco
  %(prog)s split cvat/annotations.xml --val 0.2 --out mine
  %(prog)s shard coco_2017_train coco_shards
  %(prog)s check s3://bucket/coco_shards

A path is a file or a folder in the format of COCO, MDETR, ODVG, Pascal VOC, YOLO, LabelMe, CVAT,
Label Studio, Roboflow or CSV, recognised by what is in it. PATH:train, PATH:val and PATH:test are
its parts; where it has none, the first two are drawn by seed. docs/data.md says what is read.
Files of COCO, MDETR and ODVG, images and shards may lie at an address (s3://, gs://, hf://,
https://): pip install 'dynamic-dino[remote]', docs/scale.md.

Built-in data sets lie under $DETECTRON2_DATASETS (default: datasets); see datasets/README.md."""
FORMATS = ("coco", "mdetr", "odvg")  # that are written


def _count(text: str) -> int | None:
    """A number, or None for "all"."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'all'")
    return int(text)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program(),
        description="List, check, look at, convert, split and shard data sets: built-in names, or "
        "paths.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    name = "built-in name or path of a file or folder"
    folder = "folder of a path's images (default: the folder, or that of the file)"

    listing = commands.add_parser("list", help="built-in names, and which are there")
    listing.add_argument("--all", action="store_true", help="also the 35 sets of ODinW")

    check = commands.add_parser(
        "check",
        help="find all that is wrong",
        description="Reads whole data sets, compares counts with the published ones, checks boxes, "
        "names, phrases and captions, and opens images. Exit status 1 if anything is wrong.",
    )
    check.add_argument("names", nargs="+", metavar="NAME", help=name)
    check.add_argument("--image-folder", type=Path, help=folder)
    check.add_argument(
        "--images",
        type=_count,
        default=100,
        metavar="N",
        help="how many images are opened, drawn at random, or 'all' (default: %(default)s)",
    )
    check.add_argument(
        "--tokenizer",
        default=TOKENIZER,
        help="of the text encoder that captions must fit: a hub id, a folder, or package:... "
        "(default: MiniLM's, which is BERT's)",
    )
    check.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="default: %(default)s")

    show = commands.add_parser("show", help="draw samples with their boxes and phrases")
    show.add_argument("name", help=name)
    show.add_argument("--image-folder", type=Path, help=folder)
    show.add_argument("--out", type=Path, required=True, help="picture to write (.jpg, .png)")
    show.add_argument("--count", type=int, default=12, help="images (default: %(default)s)")
    show.add_argument("--seed", type=int, default=0, help="another one draws others")

    conversion = commands.add_parser(
        "convert",
        help="from any format to COCO JSON, MDETR JSON or ODVG JSONL",
        description="Detection goes to coco and odvg, grounding to mdetr and odvg.",
    )
    conversion.add_argument("source", metavar="IN", help=name)
    conversion.add_argument("target", metavar="OUT", type=Path, help="file to write")
    conversion.add_argument("--to", choices=FORMATS, required=True)
    conversion.add_argument(
        "--from",
        dest="source_format",
        choices=tuple(TITLES),
        help="format of the source (default: what is in it)",
    )
    conversion.add_argument(
        "--bad-boxes",
        choices=("error", "drop"),
        default="error",
        help="what happens to boxes that can't be right (default: %(default)s)",
    )
    conversion.add_argument("--image-folder", type=Path, help=folder)
    conversion.add_argument(
        "--sizes-of-images",
        action="store_true",
        help="sizes are those of the image files as they are seen, not those of the COCO file",
    )
    conversion.add_argument(
        "--crowds-as-objects",
        action="store_true",
        help="boxes that were marked as crowds, as exports of masks mark all, become objects",
    )

    split = commands.add_parser(
        "split",
        help="draw a validation part by seed",
        description="Writes train.json and val.json, COCO JSON. Every name has the same share of "
        "its images in both; a name of one image is trained.",
    )
    split.add_argument("source", metavar="SOURCE", help=name)
    split.add_argument("--val", type=float, default=VAL, help="share (default: %(default)s)")
    split.add_argument("--seed", type=int, default=0, help="another one draws others")
    split.add_argument("--out", type=Path, help="folder to write (default: SOURCE_split)")
    split.add_argument("--image-folder", type=Path, help=folder)

    shard = commands.add_parser(
        "shard",
        help="pack the images into few large files",
        description="Writes OUT/images-*.zip, without compression, and OUT/annotations.json, which "
        "says where in them each image is. OUT is then the name of the data set, also where it is "
        "copied to, such as s3://bucket/OUT. An interrupted run goes on when it is started again.",
    )
    shard.add_argument("source", metavar="DATA", help=name)
    shard.add_argument("folder", metavar="OUT", type=Path, help="folder to write")
    shard.add_argument("--image-folder", type=Path, help=folder)
    shard.add_argument(
        "--shard-mb",
        type=float,
        default=SHARD_MB,
        help="most million bytes of images in a file (default: %(default)s)",
    )
    return parser.parse_args(arguments)


@command
def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        return COMMANDS[args.command](args)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _list(args: argparse.Namespace) -> int:
    root = dataset_root()
    print(f"in {address(root) or root} (DETECTRON2_DATASETS)")
    for name, entry in BUILTIN.items():
        if name.startswith("odinw_") and not args.all:
            continue
        file, found = find_builtin(entry, root)
        state = "found    " if found else "not found"
        print(f"{state}  {name:34}  {file.relative_to(root)}")
    return 0


def _check(args: argparse.Namespace) -> int:
    status = 0
    for name in (part for given in args.names for part in parts_named(given)):
        with quiet_transformers():
            result = check_dataset(
                name,
                args.image_folder,
                images=args.images,
                tokenizer=args.tokenizer,
                max_tokens=args.max_tokens,
            )
        print(*result.lines(), sep="\n", flush=True)
        status |= not result.ok
    return int(status)


def _show(args: argparse.Namespace) -> int:
    source = draw_samples(args.name, args.out, args.image_folder, count=args.count, seed=args.seed)
    print(f"{args.name}: {source}")
    print(args.out)
    return 0


def _convert(args: argparse.Namespace) -> int:
    counts = convert_dataset(
        args.source,
        args.target,
        args.to,
        args.source_format,
        bad_boxes=args.bad_boxes,
        image_folder=args.image_folder,
        sizes_of_images=args.sizes_of_images,
        crowds_as_objects=args.crowds_as_objects,
    )
    print(f"{args.source}: {counts['source']}")
    print(f"{args.target}: {counts['images']:,} images, {counts['boxes']:,} boxes")
    if counts["crowds"]:
        print(f"left out {counts['crowds']:,} boxes of crowds, which ODVG can't hold")
    return 0


def _split(args: argparse.Namespace) -> int:
    out = args.out or Path(re.sub(r"[:.].*$", "", Path(args.source).name) + "_split")
    counts = write_split(args.source, out, args.val, args.seed, args.image_folder)
    print(f"{args.source}: {counts['source']}")
    for part in ("train", "val"):
        print(f"{out / part}.json: {counts[part]:,} images")
    return 0


def _shard(args: argparse.Namespace) -> int:
    counts = write_shards(args.source, args.folder, args.image_folder, args.shard_mb)
    print(f"{args.source}: {counts['source']}")
    there = f", {counts['there']:,} of them there already" if counts["there"] else ""
    print(f"{args.folder}: {counts['images']:,} images in {counts['shards']:,} shards{there}")
    return 0


COMMANDS = {
    "list": _list,
    "check": _check,
    "show": _show,
    "convert": _convert,
    "split": _split,
    "shard": _shard,
}

if __name__ == "__main__":
    sys.exit(main())
