"""The command line of the export."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..console import command, fail, program
from ..serving.shipped import DEFAULT_MODEL, EXAMPLE_PROMPT

DESCRIPTION = """
Writes a detector for onnxruntime, OpenVINO, torch.export or TensorRT, runs what was written, and
compares it with PyTorch. `load_detector` and predict.py's --model take what is written.
"""

EXAMPLES = f"""
examples
  %(prog)s {DEFAULT_MODEL} detector.onnx --text "{EXAMPLE_PROMPT}"
  %(prog)s {DEFAULT_MODEL} detector_openvino --format openvino --text-input
  %(prog)s output/raccoon raccoon.onnx --text "raccoon." --batch dynamic \\
      --check photos/

Exit status: 0; 2 if something was wrong, also if what was written finds something else.
"""

CHECKED = 20  # of the photos to calibrate on, where there are no others
SUFFIXES = {".onnx": "onnx", ".pt2": "torch", ".engine": "tensorrt"}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog=program(),
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "model",
        metavar="MODEL",
        help="a shipped model, the folder of a run, a recipe (with --weights) or public weights of "
        "Grounding DINO (hf:OWNER/NAME or hf:DIRECTORY)",
    )
    p.add_argument(
        "output", metavar="OUTPUT", type=Path, help="FILE.onnx, FILE.pt2, FILE.engine or a folder"
    )
    p.add_argument("--weights", metavar="FILE", help="checkpoint (default: the model's own)")
    p.add_argument(
        "--random-weights",
        action="store_true",
        help="of a recipe, random ones, for which nothing is fetched: to time a model, or to see "
        "whether it can be exported, before it is trained. What the file finds means nothing",
    )
    p.add_argument(
        "--format",
        choices=("onnx", "openvino", "torch", "tensorrt"),
        help="default: what OUTPUT's name says; a folder is for OpenVINO",
    )
    p.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="side of the square canvas, a multiple of 32 (default: the recipe's)",
    )
    p.add_argument(
        "--text",
        help="the names to look for, which become part of the file (default, of a closed-set "
        "detector: all its classes)",
    )
    p.add_argument(
        "--text-input",
        nargs="?",
        type=int,
        const=0,
        metavar="TOKENS",
        help="the names are an input instead, of so many tokens at most; the text encoder and its "
        "tokenizer are written beside the file",
    )
    p.add_argument(
        "--batch",
        type=_batch,
        default=1,
        metavar="N",
        help="images at once, or 'dynamic' for any number (default: 1)",
    )
    small = p.add_mutually_exclusive_group()
    small.add_argument("--half", action="store_true", help="weights are stored in 16 bits")
    small.add_argument(
        "--int8",
        metavar="FOLDER",
        help="convolutions of 8 bits, calibrated on these photos; for OpenVINO",
    )
    p.add_argument(
        "--experts",
        choices=("sparse", "tiles", "all"),
        help="how experts are computed: each its own tokens, tiles of tokens in static shapes, or "
        "all of them for all tokens (default: the fastest for the format)",
    )
    p.add_argument("--max-detections", type=int, metavar="N", help="of an image (default: recipe)")
    p.add_argument(
        "--check",
        metavar="FOLDER",
        help="photos to compare with PyTorch on (default: some of --int8's, or generated images)",
    )
    return p


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 1 nor 'dynamic'")
    return number


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 if something was wrong."""
    args = parser().parse_args(argv)
    form = args.format or SUFFIXES.get(args.output.suffix, "openvino")
    try:
        if args.text and args.text_input is not None:
            raise ValueError("--text is baked in, --text-input is open: give one of them")
        if args.int8 and form != "openvino":
            raise ValueError(f"--int8 is for openvino, not for {form}")
        require(form)
        return run(args, form)
    except (ValueError, OSError) as error:
        return fail(error)


def require(form: str) -> None:
    """Raises ValueError, saying what to install, where the format's packages are missing."""
    from importlib.util import find_spec

    needed = {"torch": (), "openvino": ("onnx", "onnxscript", "openvino")}
    extra = "openvino" if form == "openvino" else "onnx"
    modules = needed.get(form, ("onnx", "onnxscript", "onnxruntime"))
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ValueError(
            f"the export to {form} needs {' and '.join(missing)}: "
            f"pip install 'dynamic-dino[{extra}]'"
        )


def run(args: argparse.Namespace, form: str) -> int:
    # Imported late, so that --help and wrong arguments answer at once.
    from ..data.image_files import find_images
    from ..files import writable_folder
    from ..serving.inference import load_detector
    from .check import TOLERANCES, compare, generated_images
    from .detector import export, load_source
    from .quantize import quantize
    from .tensorrt import build_engine, obstacles

    photos = find_images([args.check]) if args.check else None
    calibration = find_images([args.int8]) if args.int8 else None
    writable_folder(args.output.parent, "choose another OUTPUT")
    source = load_source(
        args.model,
        args.weights,
        args.size,
        args.text,
        args.text_input,
        args.max_detections,
        args.random_weights,
    )
    if args.random_weights:
        print(f"THE WEIGHTS ARE RANDOM: {args.output} is for timing, what it finds means nothing")
    file = args.output.with_suffix(".onnx") if form == "tensorrt" else args.output
    info = export(source, file, form, args.batch, args.half, args.experts)
    what = f"{len(info.names)} names" if info.names else f"text of {info.text.tokens} tokens"
    print(f"{file}: {args.model} on {info.size} x {info.size} pixels, {what}, {form}")
    if calibration:
        quantize(file, calibration, source.prompt)
        print(f"convolutions are of 8 bits, calibrated on {len(calibration)} photos")

    allowed = TOLERANCES["int8" if calibration else info.precision]
    photos = photos or (calibration or [])[:CHECKED]
    images = photos or generated_images(info.size)
    differs = compare(source.detector(), load_detector(file), images, source.prompt, allowed)
    kind = "photos" if photos else "generated images"
    print(f"compared with PyTorch on {kind}, {differs}")
    if not differs.compared and args.random_weights:
        print("not judged: random scores are too near to each other to be compared")
    elif not differs.compared:
        return fail(
            f"{file} is written, but whether it finds what {args.model} does isn't known: no "
            f"detection in the {kind} is sure enough to be compared, by {allowed.scores:g} above "
            "the least one; give photos that show some of the names with --check"
        )
    elif not differs.within(allowed):
        return fail(f"{file} finds something else than {args.model} does: {allowed}")
    if form == "tensorrt":
        if found := obstacles(file):
            raise ValueError(f"{file} has what TensorRT 10 doesn't take: {'; '.join(found)}")
        print(f"{file} has only operators of TensorRT 10, without plugins, and fixed shapes")
        build_engine(file, args.output, args.half)
        print(f"{args.output}: the engine, for the GPU of this machine")
    return 0
