"""Command line of the Stamps data set."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

import cv2

from ....console import command, program
from ...show import draw_samples
from .build import Settings, build, is_complete
from .library import load_library
from .sources import PACKAGES, SourceError, find_packages
from .vocabulary import VOCABULARY_FILE, load_vocabulary

VAL_REAL = Path(__file__).with_name("val_real.json")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    default = Settings()
    parser = argparse.ArgumentParser(
        prog=program(),
        description="Fetch two pinned Debian packages of free pictures and compose the Stamps"
        " data set: cut-outs with English phrases on real photos, exact boxes, COCO JSON.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    parser.add_argument("--out", type=Path, default=root, help="data root; stamps/ is made in it")
    parser.add_argument(
        "--deb", type=Path, nargs="+", default=[], metavar="PATH", help="packages fetched by hand"
    )
    parser.add_argument("--num-train", type=_count, default=default.train, metavar="N")
    parser.add_argument("--num-val", type=_count, default=default.val, metavar="N")
    parser.add_argument("--num-val-novel", type=_count, default=default.val_novel, metavar="N")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--workers", type=_count, default=os.cpu_count(), help="processes")
    parser.add_argument("--force", action="store_true", help="compose again even if complete")
    parser.add_argument("--sheet", action="store_true", help="draw every split with its boxes")
    return parser.parse_args(arguments)


@command
def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    settings = Settings(
        seed=args.seed,
        train=args.num_train,
        val=args.num_val,
        val_novel=args.num_val_novel,
        inputs=_digest(VOCABULARY_FILE, VAL_REAL),
    )
    folder = args.out / "stamps"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _fail(f"can't make {folder}: {error.strerror}. Choose another folder with --out.")
    try:
        if is_complete(folder, settings) and not args.force:
            print(f"{folder} is complete (these settings), nothing to compose.")
        else:
            _make(folder, settings, args)
        if args.sheet:
            for split in ("train", "val", "val_novel", "val_real"):
                annotations = folder / "annotations" / f"{split}.json"
                if annotations.exists() and json.loads(annotations.read_text())["images"]:
                    sheet = folder / f"sheet_{split}.png"
                    draw_samples(str(annotations), sheet, folder / split, count=24)
                    print(f"drew {sheet}")
    except PermissionError as error:
        return _fail(f"{error}. Choose a folder you may write to with --out.")
    except (SourceError, OSError, ValueError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def _digest(*paths: Path) -> str:
    """Short hash of the files, so that a changed vocabulary makes the data set a different one."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _make(folder: Path, settings: Settings, args: argparse.Namespace) -> None:
    print("fetching and checking " + " and ".join(p.file_name for p in PACKAGES), flush=True)
    debs = find_packages(PACKAGES, args.deb, folder / "packages")
    val_real = json.loads(VAL_REAL.read_text())
    reserved = frozenset(image["file_name"] for image in val_real["images"])
    cv2.setNumThreads(0)  # workers are forked later, which thread pools don't survive
    print("reading the pictures out of them (under a minute)", flush=True)
    vocabulary = load_vocabulary()
    library, photos = load_library(debs, vocabulary, reserved)
    manifest = build(folder, library, vocabulary, settings, args.workers, val_real, photos)
    for split, images in manifest["images"].items():
        where = f"{folder / split}, {folder / 'annotations' / split}.json"
        print(f"{split:9s} {images:6d} images {manifest['boxes'][split]:6d} boxes  {where}")
    print("phrases: " + ", ".join(f"{n} {name}" for name, n in manifest["phrases"].items()))
