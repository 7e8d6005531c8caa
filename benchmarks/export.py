#!/usr/bin/env python
"""Exported detectors against PyTorch: file, differences, speed, and AP.

    python benchmarks/export.py --photos FOLDER                     # differences and speed
    python benchmarks/export.py --photos FOLDER --test val_real --save
    python benchmarks/export.py --photos FOLDER --int8 FOLDER --models nano-x16

Text is an input, so that one file can be evaluated. Differences are the greatest over the photos,
of all detections. All take turns on the photos, through `load_detector`, text cached, and speeds
are ratios of medians to PyTorch's ("eager", with packed weights where they are faster). AP is that
of a test set of the model's recipe, whose data must be there. OpenVINO's bf16 is measured where the
processor has it; int8 (convolutions only) is calibrated on the photos of --int8.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from detectron2.config import instantiate
from detectron2.evaluation import inference_on_dataset
from dynamic_dino import load_detector
from dynamic_dino.console import command
from dynamic_dino.data.image_files import find_images
from dynamic_dino.data.images import as_array
from dynamic_dino.export.check import TOLERANCES, compare
from dynamic_dino.export.detector import convert_to_openvino, export, load_source
from dynamic_dino.export.onnx_format import store_in_half
from dynamic_dino.export.quantize import quantize
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.serving.exported import text_file
from dynamic_dino.serving.inference import Detector, find_model
from lib.detectors import NAMES
from lib.interleaved import interleave, quartiles, timed
from lib.options import add_output, new_parser, place_output, use_threads
from lib.provenance import provenance, settings, write_json

PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "numpy")


def exported(model: str, folder: Path, options) -> Iterator[tuple[str, str, Path, Detector]]:
    """format, precision, file and detector, one after the other; traced once for each tracer."""
    import onnx

    source = load_source(model, text_input=0)
    file = folder / "model.onnx"
    info = export(source, file, "onnx")
    yield "onnx", "float32", file, load_detector(file)
    convert_to_openvino(file, folder / "openvino", info)
    yield "openvino", "float32", folder / "openvino", load_detector(folder / "openvino")
    if has_bf16():
        detector = load_detector(folder / "openvino", dtype="bfloat16")
        yield "openvino", "bfloat16", folder / "openvino", detector
    if options.int8:
        convert_to_openvino(file, folder / "int8", info)
        quantize(folder / "int8", find_images([options.int8])[:150], source.prompt)
        yield "openvino", "int8", folder / "int8", load_detector(folder / "int8")
    convert_to_openvino(file, folder / "half", replace(info, precision="half"))
    yield "openvino", "half", folder / "half", load_detector(folder / "half")
    for part in (file, text_file(file)):
        proto = onnx.load(part)
        store_in_half(proto)
        onnx.save(proto, folder / part.name.replace("model", "half"))
    tokenizer = folder / "model.tokenizer.json"
    (folder / "half.tokenizer.json").write_bytes(tokenizer.read_bytes())
    yield "onnx", "half", folder / "half.onnx", load_detector(folder / "half.onnx")
    if "torch" in options.formats:
        export(source, folder / "model.pt2", "torch")
        yield "torch", "float32", folder / "model.pt2", load_detector(folder / "model.pt2")


def has_bf16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def megabytes(path: Path) -> float:
    """Of the detector, without its text encoder."""
    files = [path] if path.is_file() else [path / "model.xml", path / "model.bin"]
    return sum(file.stat().st_size for file in files) / 1e6


def average_precision(detector: Detector, model: str, test: str, folder: Path) -> dict[str, float]:
    """AP and AP50 of a test set of the model's recipe, percent."""
    cfg, _ = find_model(model, None)
    evaluator = instantiate({**cfg.dataloader.evaluator[test], "output_dir": str(folder)})
    loader = instantiate(cfg.dataloader.test[test])
    scores = inference_on_dataset(detector.model, loader, evaluator)
    (found,) = scores.values() if "AP" not in scores else (scores,)
    return {metric: float(found[metric]) for metric in ("AP", "AP50")}


def measure(model: str, folder: Path, options) -> list[dict]:
    photos = [as_array(path) for path in find_images([options.photos])[: options.images]]
    prompt = Prompt.parse(NAMES)
    detectors, rows = {("eager", "float32"): load_detector(model, device="cpu")}, []
    for form, precision, file, detector in exported(model, folder, options):
        detectors[form, precision] = detector
        reference = detectors["eager", "float32"]
        found = compare(reference, detector, photos, prompt, TOLERANCES["int8"])
        row = {"mb": megabytes(file), "scores": found.scores, "boxes": found.boxes}
        rows.append({"model": model, "format": form, "precision": precision} | row)
    rows.insert(0, {"model": model, "format": "eager", "precision": "float32"})

    steps = {
        name: lambda d=d: timed(lambda: [d(p, prompt) for p in photos[:4]], "cpu") / 4
        for name, d in detectors.items()
    }
    interleave(steps, 1)
    times = {name: quartiles(t) for name, t in interleave(steps, options.repeats).items()}
    eager = times["eager", "float32"]["median_ms"]
    for row in rows:
        name = row["format"], row["precision"]
        row |= times[name] | {"speed": eager / times[name]["median_ms"]}
        if options.test:
            row |= average_precision(detectors[name], model, options.test, folder / "evaluation")
        print(row)
    return rows


@command
def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["nano-dense", "nano-x16"])
    parser.add_argument("--formats", nargs="*", default=["torch"], choices=["torch"], help="beside")
    parser.add_argument("--photos", required=True, metavar="FOLDER")
    parser.add_argument("--images", type=int, default=20, help="photos that differences are of")
    parser.add_argument("--int8", metavar="FOLDER", help="photos to calibrate on")
    parser.add_argument("--test", help="a test set of the recipe, such as val_real")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch (default: as it says)")
    add_output(parser)
    options = parser.parse_args(argv)
    place_output(options, "export")
    use_threads(options)
    asked = {k: v for k, v in settings(options).items() if k not in ("photos", "int8")}  # folders
    report = provenance(PACKAGES) | {"settings": asked, "rows": []}
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            report["rows"] += measure(model, Path(folder), options)
        if options.json:
            write_json(options.json, report)


if __name__ == "__main__":
    main()
