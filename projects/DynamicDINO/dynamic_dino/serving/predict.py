"""The command `predict.py`, or `dynamic-dino-predict`: detects what a text names in images."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..console import command
from ..modeling.prompt import PromptWarning
from .labels import WRITERS, write_labels
from .options import (
    add_detection_options,
    add_model_options,
    add_tile_options,
    check_numbers,
    make_detector,
    named,
)
from .shipped import EXAMPLE_NAMES, EXAMPLE_PROMPT

DESCRIPTION = "Detects what a text names in images; writes annotated pictures, predictions.json."
FIRST, *_, LAST = EXAMPLE_NAMES
EXAMPLES = f"""\
examples:
  %(prog)s photo.jpg --text "{EXAMPLE_PROMPT}"
  %(prog)s zoo/ 'trip/**/*.jpg' --text "{EXAMPLE_PROMPT}" --threshold 0.4
  %(prog)s a.jpg b.jpg --text "{FIRST}." --text "{LAST}."     one text per image
  %(prog)s photo.jpg --text "raccoon." --config-file output/raccoon/config.yaml \\
      --weights output/raccoon/model_final.pth
  %(prog)s photo.jpg --text "{EXAMPLE_PROMPT}" --weights hf:IDEA-Research/grounding-dino-tiny

Phrases of a text are separated by full stops. A file that is named twice, or by a link, is looked
at as often. Exit status: 0, or 2 if something was wrong, also with one image; the others are done.
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders or quoted patterns")
    p.add_argument(
        "--text",
        action="append",
        default=[],
        help="what to look for; once for all images, or once for each of them, in their order "
        "(default: all classes, of a closed-set detector)",
    )
    add_model_options(p)
    add_detection_options(p)
    add_tile_options(p)
    p.add_argument(
        "--output", default="output/predict", metavar="FOLDER", help="default: output/predict"
    )
    p.add_argument(
        "--format",
        action="append",
        default=[],
        choices=tuple(WRITERS),
        help="also write annotations, to correct or to train on; may be given several times",
    )
    return p


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Doubts about a prompt are a line of their own on stderr, without the place in our code."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_plainly(message, category, *where) -> None:
            if issubclass(category, PromptWarning):
                print(f"warning: {message}", file=sys.stderr)
            else:
                show(message, category, *where)

        warnings.showwarning = show_plainly
        yield


@command
@plain_warnings()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 if something was wrong."""
    args = parser().parse_args(argv)
    # Imported late, so that --help and wrong arguments answer at once.
    from PIL import Image
    from tqdm import tqdm

    from ..data.image_files import left_out, search_images
    from ..data.images import as_array
    from ..data.visualization import draw_detections
    from ..files import writable_folder, write_text
    from .inference import detect_each, detection_records
    from .prompts import as_prompt

    try:
        check_numbers(args)
        prompts = [as_prompt(text) for text in args.text]
        files, others = search_images(args.images)
        if prompts and len(prompts) not in (1, len(files)):
            raise ValueError(
                f"--text was given {len(prompts)} times for {len(files)} images: give one for all "
                "or one for each"
            )
        folder = writable_folder(args.output, "choose another folder with --output")
        start = time.perf_counter()
        detector = make_detector(args)
        prompts = prompts or [detector.all_classes()]
    except (ValueError, OSError) as error:
        return fail(error)
    print(f"{named(args)} on {detector.device}, ready in {time.perf_counter() - start:.1f} s")
    if others:
        print(left_out(others))

    threshold = detector.threshold if args.threshold is None else args.threshold
    prompts = prompts if len(prompts) > 1 else prompts * len(files)
    pictures = picture_paths(files, folder)
    results, failed = [], 0
    progress = tqdm(total=len(files), unit="image", disable=len(files) < 2, file=sys.stderr)
    try:
        for step in range(0, len(files), detector.batch_size):
            loaded = []
            for i in range(step, min(step + detector.batch_size, len(files))):
                try:
                    loaded.append((i, as_array(files[i])))
                except (ValueError, OSError) as error:
                    failed += failure(error)
                    progress.update()
            if not loaded:
                continue
            indices, images = zip(*loaded, strict=True)
            found = detect_each(
                detector,
                images,
                [prompts[i] for i in indices],
                threshold,
                args.max_detections,
                args.nms,
                args.nms_agnostic or None,
            )
            for i, image, detections in zip(indices, images, found, strict=True):
                progress.update()
                if isinstance(detections, ValueError):
                    failed += failure(f"{files[i]}: {detections}")
                    continue
                try:
                    Image.fromarray(draw_detections(image, detections)).save(pictures[i])
                except ValueError as error:  # such as a name that the file system can't write
                    failed += failure(f"picture {pictures[i].name} of {files[i]}: {error}")
                results.append(
                    {
                        "file": str(files[i]),
                        "width": image.shape[1],
                        "height": image.shape[0],
                        "prompt": prompts[i].phrases,
                        "picture": pictures[i].name,
                        "detections": detection_records(detections),
                    }
                )
                with tqdm.external_write_mode(sys.stdout):
                    print("\n" + detection_table(results[-1], threshold))
    except KeyboardInterrupt:
        failed = fail("interrupted")
    except OSError as error:  # the disk is full, the folder is gone
        return fail(f"can't write to {folder}: {error}")
    finally:
        progress.close()
    write_text(folder / "predictions.json", json.dumps(results, indent=1) + "\n")
    try:
        written = [write_labels(results, folder, kind) for kind in args.format]
    except OSError as error:
        return fail(f"can't write the annotations: {error}")
    for path in written:
        print(f"annotations: {path}")
    print(f"\n{len(results)} of {len(files)} images. Pictures and predictions.json: {folder}/")
    return 2 if failed else 0


def failure(message: object) -> int:
    """One line about one image, above the progress bar; counts one."""
    from tqdm import tqdm

    with tqdm.external_write_mode(sys.stderr):
        fail(message)
    return 1


def picture_paths(files: Sequence[Path], folder: Path) -> list[Path]:
    """`folder`/<stem>.png, numbered where stems repeat; never one of the images themselves."""
    taken = {file.resolve() for file in files}
    paths = []
    for file in files:
        path, number = folder / f"{file.stem}.png", 2
        while path.resolve() in taken:
            path, number = folder / f"{file.stem}_{number}.png", number + 1
        taken.add(path.resolve())
        paths.append(path)
    return paths


def detection_table(result: dict, threshold: float) -> str:
    from tabulate import tabulate

    head = f"{result['file']} ({result['width']} x {result['height']}) -> {result['picture']}"
    if not result["detections"]:
        return f"{head}\n  nothing with a score of {threshold:g} or more"
    rows = [
        [" ".join(d["phrase"].split()), f"{d['score']:.2f}", *(f"{v:.0f}" for v in d["box"])]
        for d in result["detections"]
    ]
    headers = ["phrase", "score", "left", "top", "right", "bottom"]
    table = tabulate(rows, headers, disable_numparse=True, colalign=["left"] + ["right"] * 5)
    return head + "\n" + "\n".join("  " + line for line in table.splitlines())


def fail(message: object) -> int:
    """One line on stderr, and the exit status that goes with it."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2
