#!/usr/bin/env python
"""Exported detectors against PyTorch: file, differences, speed, and AP.

    python benchmarks/export.py --photos FOLDER                     # differences and speed
    python benchmarks/export.py --photos FOLDER --int8 FOLDER --test val_real --save
    python benchmarks/export.py --photos FOLDER --int8 FOLDER --test val_real --save --resume
    python benchmarks/export.py --photos FOLDER --random-weights --images 4 --repeats 7 \
        --models configs/moe_tuning/dynamic_dino_x16_top2.py --json edge.json

Text is an input, so that one file can be evaluated. Differences are those of twins, by what each
precision is allowed, see `dynamic_dino.export.check`: the greatest over the photos. All take turns
on the photos, through `load_detector`, text cached, and speeds are ratios of medians to PyTorch's
("eager", with packed weights where they are faster). AP is that of a test set of the model's
recipe, whose data must be there. OpenVINO's bf16 is measured where the processor has it; int8
(convolutions only) is calibrated on the photos of --int8. Models without weights are timed with
random ones, which take as long; what they find means nothing.

What is measured of a model is written at once; --resume leaves out the models that are in the file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

from detectron2.config import instantiate
from detectron2.evaluation import inference_on_dataset
from dynamic_dino import load_detector
from dynamic_dino.console import command, fail
from dynamic_dino.data.image_files import find_images
from dynamic_dino.data.images import as_array
from dynamic_dino.export.check import TOLERANCES, compare
from dynamic_dino.export.detector import convert_to_openvino, export, load_source
from dynamic_dino.export.onnx_format import store_in_half
from dynamic_dino.export.quantize import quantize
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.serving.exported import text_file
from dynamic_dino.serving.inference import Detector, find_model, random_model
from lib import tables
from lib.detectors import NAMES
from lib.interleaved import interleave, quartiles, timed
from lib.options import add_output, new_parser, place_output, use_threads
from lib.provenance import provenance, settings, write_json

PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "numpy")


def say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def exported(
    model: str, folder: Path, options: argparse.Namespace
) -> Iterator[tuple[str, str, Path, Detector]]:
    """format, precision, file and detector, one after the other; traced once for each tracer."""
    import onnx

    source = load_source(model, text_input=0, random_weights=options.random_weights)
    file = folder / "model.onnx"
    info = export(source, file, "onnx")
    yield "onnx", "float32", file, load_detector(file)
    for part in (file, text_file(file)):
        proto = onnx.load(part)
        store_in_half(proto)
        onnx.save(proto, folder / part.name.replace("model", "half"))
    tokenizer = folder / "model.tokenizer.json"
    (folder / "half.tokenizer.json").write_bytes(tokenizer.read_bytes())
    yield "onnx", "half", folder / "half.onnx", load_detector(folder / "half.onnx")
    convert_to_openvino(file, folder / "openvino", info)
    yield "openvino", "float32", folder / "openvino", load_detector(folder / "openvino")
    if has_bf16():
        detector = load_detector(folder / "openvino", dtype="bfloat16")
        yield "openvino", "bfloat16", folder / "openvino", detector
    convert_to_openvino(file, folder / "half", replace(info, precision="half"))
    yield "openvino", "half", folder / "half", load_detector(folder / "half")
    if options.int8:
        convert_to_openvino(file, folder / "int8", info)
        quantize(folder / "int8", find_images([options.int8])[: options.calibrate], source.prompt)
        yield "openvino", "int8", folder / "int8", load_detector(folder / "int8")
    if "torch" in options.formats:
        export(source, folder / "model.pt2", "torch")
        yield "torch", "float32", folder / "model.pt2", load_detector(folder / "model.pt2")


def eager(model: str, options: argparse.Namespace) -> Detector:
    """PyTorch's, as `load_detector` gives it."""
    if not options.random_weights:
        return load_detector(model, device="cpu")
    detector, cfg = random_model(model, pack="auto")
    detector.return_routings = False
    return Detector(detector, cfg.inference.size, "cpu", 0.0)


def has_bf16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def megabytes(path: Path) -> float:
    """Of the detector, without its text encoder."""
    files = [path] if path.is_file() else [path / "model.xml", path / "model.bin"]
    return sum(file.stat().st_size for file in files) / 1e6


class Test:
    """AP and AP50 of a test set of a model's recipe, percent; its images are decoded once."""

    def __init__(self, model: str, options: argparse.Namespace) -> None:
        cfg, _ = find_model(model, None)
        self.config = cfg.dataloader.evaluator[options.test]
        loader = instantiate(cfg.dataloader.test[options.test])
        batches = -(-options.test_images // cfg.dataloader.test[options.test].batch_size)
        self.batches = list(islice(loader, batches))

    def scores(self, detector: Detector) -> dict[str, float]:
        evaluator = instantiate({**self.config, "output_dir": None})
        found = inference_on_dataset(detector.model, self.batches, evaluator)
        (scores,) = found.values() if "AP" not in found else (found,)
        return {metric: float(scores[metric]) for metric in ("AP", "AP50")}


def measure(model: str, folder: Path, options: argparse.Namespace) -> list[dict]:
    photos = [as_array(path) for path in find_images([options.photos])[: options.images]]
    prompt = Prompt.parse(NAMES)
    reference = eager(model, options)
    detectors, rows = {("eager", "float32"): reference}, []
    for form, precision, file, detector in exported(model, folder, options):
        detectors[form, precision] = detector
        allowed = TOLERANCES["half" if precision == "bfloat16" else precision]
        found = asdict(compare(reference, detector, photos, prompt, allowed))
        differs = {key: found[key] for key in ("compared", "missing", "extra", "scores", "boxes")}
        row = {"format": form, "precision": precision, "mb": megabytes(file)} | differs
        rows.append({"model": model} | row)
        say(f"{model}, {form}, {precision}: exported and compared")
    rows.insert(0, {"model": model, "format": "eager", "precision": "float32"})

    steps = {
        name: lambda d=d: timed(lambda: [d(p, prompt) for p in photos[:4]], "cpu") / 4
        for name, d in detectors.items()
    }
    interleave(steps, 1)
    times = {name: quartiles(t) for name, t in interleave(steps, options.repeats).items()}
    say(f"{model}: timed")
    baseline = times["eager", "float32"]["median_ms"]
    test = Test(model, options) if options.test else None
    for row in rows:
        name = row["format"], row["precision"]
        row |= times[name] | {"speed": baseline / times[name]["median_ms"]}
        if test:
            row |= test.scores(detectors[name])
            say(f"{', '.join((model, *name))}: AP {row['AP']:.2f}")
    return rows


def earlier(path: Path, report: dict) -> list[dict]:
    """The rows in a file of an interrupted run with the settings of `report`; ValueError if they
    were others."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    for key in ("machine", "versions", "commit", "settings"):
        if found[key] != report[key]:
            raise ValueError(
                f"{path} was measured with {key} {found[key]}, not {report[key]}: leave out "
                "--resume to measure all anew"
            )
    return found["rows"]


@command
def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["nano-dense", "nano-x16"])
    parser.add_argument("--formats", nargs="*", default=["torch"], choices=["torch"], help="beside")
    parser.add_argument("--random-weights", action="store_true", help="of recipes without weights")
    parser.add_argument("--photos", required=True, metavar="FOLDER")
    parser.add_argument("--images", type=int, default=20, help="photos that differences are of")
    parser.add_argument("--int8", metavar="FOLDER", help="photos to calibrate on")
    parser.add_argument("--calibrate", type=int, default=100, help="how many of them")
    parser.add_argument("--test", help="a test set of the recipe, such as val_real")
    parser.add_argument("--test-images", type=int, default=1000, help="of these, at most")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch (default: as it says)")
    parser.add_argument("--resume", action="store_true", help="go on with the file of results")
    add_output(parser)
    options = parser.parse_args(argv)
    place_output(options, "export")
    use_threads(options)
    try:
        run(options)
    except (ValueError, OSError) as error:
        return fail(error)
    return 0


def run(options: argparse.Namespace) -> None:
    left_out = ("models", "photos", "int8", "resume")  # folders, and what may differ
    asked = {k: v for k, v in settings(options).items() if k not in left_out}
    report = provenance(PACKAGES) | {"settings": asked, "rows": []}
    if options.resume and options.json:
        report["rows"] = earlier(options.json, report)
    done = {row["model"] for row in report["rows"]}
    for model in options.models:
        if model in done:
            say(f"{model}: in {options.json}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            report["rows"] += measure(model, Path(folder), options)
        if options.json:
            write_json(options.json, report)
    print(tables.export(report))


if __name__ == "__main__":
    sys.exit(main())
