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
from .shipped import DEFAULT_MODEL, EXAMPLE_NAMES, EXAMPLE_PROMPT

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
    p.add_argument(
        "--output", default="output/predict", metavar="FOLDER", help="default: output/predict"
    )
    p.add_argument(
        "--format",
        action="append",
        default=[],
        choices=("coco", "yolo", "label-studio"),
        help="also write annotations, to correct or to train on; may be given several times",
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
    from .inference import detection_records
    from .labels import write_labels
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


def detect_each(detector, images: Sequence, prompts: Sequence, *options) -> list:
    """The detections of each image or, where the model refuses one, the ValueError that says why:
    one image, or its text, costs no other of the batch."""
    try:
        return detector(list(images), list(prompts), *options)
    except ValueError as error:
        if len(images) == 1:
            return [error]
    return [
        result
        for image, prompt in zip(images, prompts, strict=True)
        for result in detect_each(detector, [image], [prompt], *options)
    ]


def failure(message: object) -> int:
    """One line about one image, above the progress bar; counts one."""
    from tqdm import tqdm

    with tqdm.external_write_mode(sys.stderr):
        fail(message)
    return 1


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


def make_detector(args: argparse.Namespace):
    from ..engine.allocator import keep_freed_memory
    from .inference import load_detector

    keep_freed_memory()
    return load_detector(
        args.config_file or args.model,
        args.weights,
        args.device,
        args.threshold,
        args.dtype,
        args.accelerate,
        args.pack,
    )


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
