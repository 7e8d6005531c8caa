"""The command `predict.py`, or `dynamic-dino-predict`: what a text names, in images and videos."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import command, fail, program
from ..modeling.prompt import Prompt, PromptWarning
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

if TYPE_CHECKING:
    from .inference import Detector

DESCRIPTION = """\
Detects what a text names in images and videos. Writes annotated pictures and predictions.json; for
a video, an annotated one, NAME.mp4, and NAME.jsonl with a line for each frame.
"""
FIRST, *_, LAST = EXAMPLE_NAMES
EXAMPLES = f"""\
examples:
  %(prog)s photo.jpg --text "{EXAMPLE_PROMPT}"
  %(prog)s zoo/ 'trip/**/*.jpg' --text "{EXAMPLE_PROMPT}" --threshold 0.4
  %(prog)s a.jpg b.jpg --text "{FIRST}." --text "{LAST}."     one text per image
  %(prog)s photo.jpg --text "raccoon." --config-file output/raccoon/config.yaml \\
      --weights output/raccoon/model_final.pth
  %(prog)s photo.jpg --text "{EXAMPLE_PROMPT}" --weights hf:IDEA-Research/grounding-dino-tiny
  %(prog)s clip.mp4 --text "{EXAMPLE_PROMPT}" --track --every 2
  %(prog)s rtsp://192.168.1.20/door --text "{FIRST}." --max-frames 1000
  %(prog)s --camera 0 --text "{FIRST}."

Phrases of a text are separated by full stops. A file that is named twice, or by a link, is looked
at as often. Results are on the disk as they come, images' in predictions.jsonl, a line each; what
ends early, by Ctrl-C, SIGTERM or a full disk, keeps them. Exit status: 0, or 2 if something was
wrong, also with one image; the others are done.
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog=program(),
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="files of images or videos, folders, quoted patterns, or addresses of streams",
    )
    p.add_argument(
        "--camera", type=int, metavar="NUMBER", help="look through a camera; the first is 0"
    )
    p.add_argument(
        "--text",
        action="append",
        default=[],
        help="what to look for; once for all, or once for each image and video: files in their "
        "order, streams, the camera (default: all classes, of a closed-set detector)",
    )
    add_video_options(p)
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


def add_video_options(p: argparse.ArgumentParser) -> None:
    video = p.add_argument_group("videos")
    video.add_argument(
        "--track", action="store_true", help="follow objects: numbers them, and counts them"
    )
    video.add_argument("--every", type=int, metavar="N", help="look at every N-th frame only")
    video.add_argument("--max-frames", type=int, metavar="N", help="look at N frames, then end")


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


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, with which batch systems and `docker stop` end a program, is as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():  # which gets no signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@command
@plain_warnings()
@terminated_as_interrupted()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 if something was wrong."""
    p = parser()
    args = p.parse_args(argv)
    if not args.images and args.camera is None:
        p.error("nothing to look at: name images or videos, or give --camera 0")
    # Imported late, so that --help and wrong arguments answer at once.
    from ..data.image_files import is_picture, left_out, search_images
    from ..files import writable_folder
    from .predict_video import check_video_options, predict_video
    from .prompts import as_prompt
    from .video import is_stream, is_video

    try:
        check_numbers(args)
        prompts = [as_prompt(text) for text in args.text]
        streams = [name for name in args.images if is_stream(name)]
        named_files = [name for name in args.images if not is_stream(name)]
        files, others = search_images(named_files, lambda path: is_picture(path) or is_video(path))
        sources = [*files, *streams] + ([args.camera] if args.camera is not None else [])
        if prompts and len(prompts) not in (1, len(sources)):
            raise ValueError(
                f"--text was given {len(prompts)} times for {len(sources)} images and videos: give "
                "one for all or one for each"
            )
        images = [i for i, file in enumerate(files) if not is_video(file)]
        videos = [i for i in range(len(sources)) if i not in set(images)]
        check_video_options(args, bool(images), bool(videos))
        folder = writable_folder(args.output, "choose another folder with --output")
        start = time.perf_counter()
        detector = make_detector(args)
        prompts = prompts or [detector.all_classes()]
    except (ValueError, OSError, ImportError) as error:
        return fail(error)
    print(f"{named(args)} on {detector.device}, ready in {time.perf_counter() - start:.1f} s")
    if others:
        print(left_out(others))

    prompts = prompts if len(prompts) > 1 else prompts * len(sources)
    name_output = partial(output_path, folder, {file.resolve() for file in files})
    try:
        failed = 0
        if images:
            files, of_images = [files[i] for i in images], [prompts[i] for i in images]
            failed = predict_images(args, detector, files, of_images, folder, name_output)
        for i in videos:
            failed += predict_video(
                args, detector, sources[i], prompts[i], folder, name_output, failure
            )
    except KeyboardInterrupt:
        return fail("interrupted")
    except OSError as error:  # the disk is full, the folder is gone
        return fail(f"can't write to {folder}: {error}; what was found before is there")
    return 2 if failed else 0


def predict_images(
    args: argparse.Namespace,
    detector: Detector,
    files: Sequence[Path],
    prompts: Sequence[Prompt],
    folder: Path,
    name_output: Callable[[str, str], Path],
) -> int:
    """Writes pictures, predictions.jsonl as they come and predictions.json at the end; returns how
    many images failed, each for itself. An interruption, or the OSError of a full disk, is raised
    once what was done is written."""
    from PIL import Image
    from tqdm import tqdm

    from ..data.images import as_array
    from ..data.visualization import draw_detections
    from ..files import write_text
    from .inference import detect_each, detection_records

    threshold = detector.threshold if args.threshold is None else args.threshold
    pictures = [name_output(file.stem, ".png") for file in files]
    results, failed = [], 0
    ended: KeyboardInterrupt | OSError | None = None
    lines = name_output("predictions", ".jsonl").open("w", encoding="utf-8", newline="\n")
    progress = tqdm(total=len(files), unit="image", disable=len(files) < 2, file=sys.stderr)
    try:
        for step in range(0, len(files), detector.batch_size):
            loaded = []
            for i in range(step, min(step + detector.batch_size, len(files))):
                try:
                    loaded.append((i, as_array(files[i])))
                except Exception as error:  # decoders raise what they like
                    known = isinstance(error, ValueError | OSError)
                    failed += failure(error if known else _unexpected(files[i], error))
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
                errors=(Exception,),
            )
            for i, image, detections in zip(indices, images, found, strict=True):
                progress.update()
                if isinstance(detections, Exception):
                    failed += failure(_unexpected(files[i], detections))
                    continue
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
                lines.write(json.dumps(results[-1]) + "\n")
                lines.flush()
                try:
                    Image.fromarray(draw_detections(image, detections)).save(pictures[i])
                except ValueError as error:  # such as a name that the file system can't write
                    failed += failure(f"picture {pictures[i].name} of {files[i]}: {error}")
                with tqdm.external_write_mode(sys.stdout):
                    print("\n" + detection_table(results[-1], threshold))
    except (KeyboardInterrupt, OSError) as error:
        ended = error
    finally:
        progress.close()
        with suppress(OSError):  # what is left of the disk is tried below
            lines.close()
    write_text(folder / "predictions.json", json.dumps(results, indent=1) + "\n")
    for path in [write_labels(results, folder, kind) for kind in args.format]:
        print(f"annotations: {path}")
    print(f"\n{len(results)} of {len(files)} images. Pictures and predictions.json: {folder}/")
    if ended is not None:
        raise ended
    return failed


def _unexpected(file: Path, error: Exception) -> str:
    """What is said of an image that the model refuses, or of an error that nobody thought of."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{file}: {kind}{error}"


def failure(message: object) -> int:
    """One line about one image or video, above the progress bar; counts one."""
    from tqdm import tqdm

    with tqdm.external_write_mode(sys.stderr):
        fail(message)
    return 1


def output_path(folder: Path, taken: set[Path], stem: str, suffix: str) -> Path:
    """`folder`/<stem><suffix>, numbered where that is taken, by an image or video itself or by what
    is written for another; it is taken now."""
    path, number = folder / f"{stem}{suffix}", 2
    while path.resolve() in taken:
        path, number = folder / f"{stem}_{number}{suffix}", number + 1
    taken.add(path.resolve())
    return path


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
