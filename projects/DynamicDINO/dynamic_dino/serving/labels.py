"""Detections as annotations, to be corrected or trained on: COCO JSON, YOLO, Label Studio."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import yaml

from ..files import write_text


def write_labels(results: Sequence[dict], folder: Path, kind: str) -> Path:
    """Writes what predict.py found in all images as annotations of a kind of `WRITERS`.

    The classes are the phrases that were asked for, in the order in which they came up; a box
    that rounding left without an area is none.

    results  as in predictions.json: file, width, height, prompt, picture and detections of each
    folder   that of predictions.json
    Returns the file to open. Raises OSError.
    """
    names = list(dict.fromkeys(name for result in results for name in result["prompt"]))
    return WRITERS[kind](results, names, folder)


def write_coco(results: Sequence[dict], names: list[str], folder: Path) -> Path:
    """A data set in COCO JSON, coco.json: images, categories, and annotations with their scores."""
    annotations = [
        {
            "image_id": i,
            "category_id": names.index(phrase) + 1,
            "bbox": [left, top, width, height],
            "area": round(width * height, 2),
            "iscrowd": 0,
            "score": score,
        }
        for i, result in enumerate(results, 1)
        for phrase, score, (left, top, width, height) in _boxes(result)
    ]
    images = [
        {
            "id": i,
            "file_name": _relative(result["file"], folder),
            "width": result["width"],
            "height": result["height"],
        }
        for i, result in enumerate(results, 1)
    ]
    content = {
        "images": images,
        "annotations": [{"id": i} | a for i, a in enumerate(annotations, 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
    }
    path = folder / "coco.json"
    write_text(path, json.dumps(content, indent=1) + "\n")
    return path


def write_yolo(results: Sequence[dict], names: list[str], folder: Path) -> Path:
    """yolo/data.yaml, yolo/labels/*.txt and copies of the images, which YOLO wants beside them."""
    root = folder / "yolo"
    (root / "images").mkdir(parents=True, exist_ok=True)
    for result in results:
        image = Path(result["file"])
        stem = Path(result["picture"]).stem  # unlike the image's own it is there once
        shutil.copyfile(image, root / "images" / (stem + image.suffix))
        lines = []
        for phrase, _, (left, top, width, height) in _boxes(result):
            box = (
                (left + width / 2) / result["width"],
                (top + height / 2) / result["height"],
                width / result["width"],
                height / result["height"],
            )
            lines.append(f"{names.index(phrase)} " + " ".join(f"{value:.8f}" for value in box))
        write_text(root / "labels" / f"{stem}.txt", "".join(f"{line}\n" for line in lines))
    content = {"train": "images", "val": "images", "names": dict(enumerate(names))}
    path = root / "data.yaml"
    write_text(path, yaml.safe_dump(content, allow_unicode=True, sort_keys=False))
    return path


def write_label_studio(results: Sequence[dict], names: list[str], folder: Path) -> Path:
    """Tasks with predictions, label_studio.json, and the labels of the project that they belong to,
    label_studio.xml. Images are addressed as its local files, from the root of the file system."""
    tasks = []
    for result in results:
        path = Path(os.path.abspath(result["file"]))
        address = quote(os.fsencode(path.relative_to(path.anchor).as_posix()))
        boxes = [
            {
                "id": str(i),
                "type": "rectanglelabels",
                "from_name": "label",
                "to_name": "image",
                "original_width": result["width"],
                "original_height": result["height"],
                "image_rotation": 0,
                "score": score,
                "value": {
                    "x": 100 * left / result["width"],
                    "y": 100 * top / result["height"],
                    "width": 100 * width / result["width"],
                    "height": 100 * height / result["height"],
                    "rotation": 0,
                    "rectanglelabels": [phrase],
                },
            }
            for i, (phrase, score, (left, top, width, height)) in enumerate(_boxes(result), 1)
        ]
        best = max((box["score"] for box in boxes), default=0)
        predictions = [{"model_version": "dynamic-dino", "score": best, "result": boxes}]
        data = {"image": f"/data/local-files/?d={address}"}
        tasks.append({"data": data, "predictions": predictions})
    labels = "".join(f"    <Label value={quoteattr(name)}/>\n" for name in names)
    write_text(
        folder / "label_studio.xml",
        '<View>\n  <Image name="image" value="$image"/>\n'
        f'  <RectangleLabels name="label" toName="image">\n{labels}  </RectangleLabels>\n</View>\n',
    )
    path = folder / "label_studio.json"
    write_text(path, json.dumps(tasks, indent=1) + "\n")
    return path


WRITERS = {"coco": write_coco, "yolo": write_yolo, "label-studio": write_label_studio}


def _boxes(result: dict) -> Iterator[tuple[str, float, tuple[float, float, float, float]]]:
    """(phrase, score, (left, top, width, height))"""
    for found in result["detections"]:
        x0, y0, x1, y1 = found["box"]
        if x1 > x0 and y1 > y0:
            yield (
                found["phrase"],
                found["score"],
                (x0, y0, round(x1 - x0, 4), round(y1 - y0, 4)),
            )


def _relative(file: str, folder: Path) -> str:
    try:
        return Path(os.path.relpath(file, folder)).as_posix()
    except ValueError:  # on another drive of Windows
        return Path(os.path.abspath(file)).as_posix()
