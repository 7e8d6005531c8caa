"""The command line of labelling."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..console import command, fail, program
from ..serving.labels import WRITERS
from ..serving.options import (
    add_detection_options,
    add_model_options,
    add_tile_options,
    check_numbers,
    make_detector,
    named,
)
from ..serving.predict import plain_warnings
from ..serving.shipped import EXAMPLE_PROMPT

DESCRIPTION = """
Labels a folder of images: finds what a text names in all of them, and writes annotations to correct
or to train on, and a page to look them over, the least certain first.

Results are on the disk as they come. If it is ended, by Ctrl-C or a power cut, the same command
goes on where it was; run again later, it adds new images.
"""
EXAMPLES = f"""
examples
  %(prog)s photos/ --text "{EXAMPLE_PROMPT}"
  %(prog)s photos/ --text "{EXAMPLE_PROMPT}" --format yolo --format label-studio --threshold 0.3
  %(prog)s photos/ --names names.txt --weights hf:IDEA-Research/grounding-dino-tiny
  %(prog)s aerial/ --text "{EXAMPLE_PROMPT}" --tile 640 --output output/aerial

written to --output
  labels.jsonl       a line an image, as it comes; what a later run goes on from
  predictions.json   all of them, as predict.py writes it, to be scored by dynamic_dino.evaluation
  review.html        the page, by itself: filter by name and score
  coco.json, yolo/, voc/, labelme/, label_studio.json: what --format asks for

Phrases of --text are separated by full stops; --names takes a file with a name a line, where names
may have some. A low --threshold finds more, and more that is wrong: the page shows where to draw
the line, and the same command with a higher one takes what is there, without looking again.
Exit status: 0, or 2 if something was wrong, also with one image; the others are labelled.
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog=program(),
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("folder", type=Path, help="images, also those of the folders in it")
    what = p.add_mutually_exclusive_group()
    what.add_argument(
        "--text", help="what to look for (default: all classes, of a closed-set detector)"
    )
    what.add_argument(
        "--names", type=Path, metavar="FILE", help="a text file with a name a line instead"
    )
    p.add_argument(
        "--format",
        action="append",
        choices=tuple(WRITERS),
        help="of the annotations; may be given several times (default: coco)",
    )
    add_model_options(p)
    add_detection_options(p)
    add_tile_options(p)
    p.add_argument(
        "--output",
        type=Path,
        default=Path("output/label"),
        metavar="FOLDER",
        help="default: output/label",
    )
    p.add_argument(
        "--restart", action="store_true", help="begin anew; what is there is kept as labels.jsonl.1"
    )
    p.add_argument(
        "--workers", type=int, default=4, metavar="N", help="threads that read images (default: 4)"
    )
    p.add_argument(
        "--page-images",
        type=int,
        default=400,
        metavar="N",
        help="the most that review.html shows, the least certain; 0: no page (default: 400)",
    )
    return p


@command
@plain_warnings()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 if something was wrong."""
    args = parser().parse_args(argv)
    # Imported late, so that --help and wrong arguments answer at once.
    from ..data.image_files import files_under, is_unread_picture, left_out
    from ..modeling.prompt import Prompt
    from ..serving.prompts import as_prompt
    from .page import write_page
    from .run import images_of, label_folder

    try:
        check_numbers(args)
        if args.workers < 1:
            raise ValueError(f"--workers {args.workers} is less than 1")
        prompt = None if args.text is None else as_prompt(args.text)
        if args.names is not None:
            prompt = Prompt.from_phrases(_read_names(args.names))
        images_of(args.folder, args.output)  # before the model is loaded
        if unread := [p for p in files_under(args.folder) if is_unread_picture(p)]:
            print(left_out(unread))
        detector = make_detector(args)
        prompt = prompt or detector.all_classes()
        print(f"{named(args)} on {detector.device}; results go to {args.output}/")
        labels = label_folder(
            detector,
            args.folder,
            prompt,
            args.output,
            args.format or ["coco"],
            args.threshold,
            args.max_detections,
            args.nms,
            args.nms_agnostic or None,
            settings(args),
            args.restart,
            args.workers,
        )
        page = None
        if args.page_images > 0:
            page = write_page(labels, args.output, named(args), args.page_images)
    except KeyboardInterrupt:
        return fail("interrupted; the same command goes on from here")
    except (ValueError, OSError) as error:
        return fail(error)
    print(summary(labels))
    for path in labels.files:
        print(f"annotations: {path}")
    if page is not None:
        print(f"look at them: {page}")
    return 2 if labels.failed else 0


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What results depend on, beside the names and the options of a call."""
    tiles = {"tile": args.tile, "overlap": args.overlap} if args.tile is not None else {}
    return {"model": named(args), "weights": weights_of(args), "dtype": args.dtype, **tiles}


def weights_of(args: argparse.Namespace) -> str | None:
    """A hash of the file of weights, or what stands for it: None for a model's default that is no
    file here."""
    from ..files import sha256_of_file
    from ..serving.inference import default_weights

    model = args.config_file or args.model
    file = Path(args.weights or default_weights(model) or model)
    return sha256_of_file(file)[:16] if file.is_file() else args.weights


def summary(labels) -> str:
    """What was found, name by name, and what couldn't be looked at."""
    from tabulate import tabulate

    boxes, images = labels.boxes, labels.images
    rows = [[" ".join(name.split()), f"{n:,}", f"{images[name]:,}"] for name, n in boxes.items()]
    table = tabulate(rows, ["name", "boxes", "images"], disable_numparse=True, colalign=("left",))
    empty = sum(not result["detections"] for result in labels.results)
    lines = [
        f"{len(labels.results):,} images, {labels.fresh:,} of them labelled now; {empty:,} without "
        "a box",
        *("  " + line for line in table.splitlines()),
    ]
    if never := [name for name, n in boxes.items() if not n]:
        lines.append(f"never found: {', '.join(never)}")
    if labels.failed:
        lines.append(f"images that can't be looked at: {len(labels.failed):,}")
        lines += [f"  {name}: {why}" for name, why in labels.failed]
    return "\n".join(lines)


def _read_names(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not text in UTF-8: save it as UTF-8") from None
    names = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not names:
        raise ValueError(f"{file} has no name: write one a line")
    return names
