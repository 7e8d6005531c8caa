"""Detections as annotations, to be corrected or trained on, in the formats of annotation tools:
COCO JSON, YOLO, Pascal VOC, LabelMe, Label Studio. `data.formats` reads all of them.

Boxes are those of the picture as it is seen, turned as its EXIF tag says: so these tools show it.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

import yaml

from ..files import partial_name, write_text

LONGEST = 180  # bytes of a file's name; file systems take 255


def write_labels(results: Sequence[dict], folder: Path, kind: str) -> Path:
    """Writes what was found in all images as annotations of a kind of `WRITERS`.

    The classes are the phrases that were asked for, in the order in which they came up, with single
    blanks between their words; boxes are clipped to their image, and one that rounding left without
    an area is none. An image that was looked at more than once is there once, with all boxes.

    YOLO, VOC and LabelMe want the images beside the labels. They are hard links where the file
    system has such, else copies, and are called as in their folder: ``trip/day 1/a.jpg`` becomes
    ``trip__day 1__a.jpg``. A folder of the same name as the new one that differs from it, with
    corrections perhaps, is kept as ``yolo.1`` and so on.

    Args:
        results: as in predictions.json: file, width, height, prompt and detections of each image.
        folder: where it is written.

    Returns the file or folder to open. Raises OSError.
    """
    results = _one_for_each_image(results)
    names = list(dict.fromkeys(one_line(name) for result in results for name in result["prompt"]))
    return WRITERS[kind](results, names, folder)


def write_coco(results: Sequence[dict], names: list[str], folder: Path) -> Path:
    """A data set in COCO JSON, coco.json: images, categories, and annotations with their scores."""
    numbers = {name: i for i, name in enumerate(names, 1)}
    annotations = [
        {
            "image_id": i,
            "category_id": numbers[name],
            "bbox": [x0, y0, round(x1 - x0, 4), round(y1 - y0, 4)],
            "area": round((x1 - x0) * (y1 - y0), 2),
            "iscrowd": 0,
            "score": score,
        }
        for i, result in enumerate(results, 1)
        for name, score, (x0, y0, x1, y1) in _boxes(result)
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
    """yolo/data.yaml, yolo/images, yolo/labels/*.txt: class, middle and size in parts of the image.
    An image without boxes has an empty file."""
    numbers = {name: i for i, name in enumerate(names)}
    path = folder / "yolo"
    with _new_folder(path) as root:
        (root / "labels").mkdir()
        for result, image in _placed(results, root / "images"):
            size = result["width"], result["height"]
            lines = []
            for name, _, (x0, y0, x1, y1) in _boxes(result):
                middle, sides = ((x0 + x1) / 2, (y0 + y1) / 2), (x1 - x0, y1 - y0)
                parts = [a / b for pair in (middle, sides) for a, b in zip(pair, size, strict=True)]
                lines.append(" ".join([str(numbers[name]), *(f"{part:.8f}" for part in parts)]))
            _write(root / "labels" / f"{image.stem}.txt", "".join(f"{line}\n" for line in lines))
        content = {"train": "images", "val": "images", "names": dict(enumerate(names))}
        settings = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
        _write(root / "data.yaml", settings)
    return path / "data.yaml"


def write_voc(results: Sequence[dict], names: list[str], folder: Path) -> Path:
    """voc/JPEGImages, voc/Annotations/*.xml. Corners are whole pixels, counted from 1, the last one
    inside the box, as VOC's development kit has it; a box is at least one pixel wide and high."""
    path = folder / "voc"
    with _new_folder(path) as root:
        (root / "Annotations").mkdir()
        for result, image in _placed(results, root / "JPEGImages"):
            tree = ElementTree.Element("annotation")
            _elements(tree, folder="JPEGImages", filename=image.name)
            size = ElementTree.SubElement(tree, "size")
            _elements(size, width=result["width"], height=result["height"], depth=3)
            for name, _, box in _boxes(result):
                item = ElementTree.SubElement(tree, "object")
                _elements(item, name=name, pose="Unspecified", truncated=0, difficult=0)
                x0, x1 = _whole(box[0], box[2], result["width"])
                y0, y1 = _whole(box[1], box[3], result["height"])
                corners = ElementTree.SubElement(item, "bndbox")
                _elements(corners, xmin=x0 + 1, ymin=y0 + 1, xmax=x1, ymax=y1)
            ElementTree.indent(tree)
            text = ElementTree.tostring(tree, encoding="unicode")
            _write(root / "Annotations" / f"{image.stem}.xml", f"{text}\n")
    return path


def write_labelme(results: Sequence[dict], names: list[str], folder: Path) -> Path:
    """labelme/: images, and a JSON file beside each; a shape's description is its score."""
    path = folder / "labelme"
    with _new_folder(path) as root:
        for result, image in _placed(results, root):
            shapes = [
                {
                    "label": name,
                    "points": [[x0, y0], [x1, y1]],
                    "group_id": None,
                    "description": f"score {score:g}",
                    "shape_type": "rectangle",
                    "flags": {},
                }
                for name, score, (x0, y0, x1, y1) in _boxes(result)
            ]
            content = {
                "version": "5.5.0",
                "flags": {},
                "shapes": shapes,
                "imagePath": image.name,
                "imageData": None,
                "imageHeight": result["height"],
                "imageWidth": result["width"],
            }
            _write(image.with_suffix(".json"), json.dumps(content, ensure_ascii=False, indent=1))
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
                    "x": 100 * x0 / result["width"],
                    "y": 100 * y0 / result["height"],
                    "width": 100 * (x1 - x0) / result["width"],
                    "height": 100 * (y1 - y0) / result["height"],
                    "rotation": 0,
                    "rectanglelabels": [name],
                },
            }
            for i, (name, score, (x0, y0, x1, y1)) in enumerate(_boxes(result), 1)
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


WRITERS = {
    "coco": write_coco,
    "yolo": write_yolo,
    "voc": write_voc,
    "labelme": write_labelme,
    "label-studio": write_label_studio,
}


def one_line(name: str) -> str:
    """A name as a tool shows it: no line breaks, no control characters, which XML can't hold."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\ufffe\uffff]", " ", name).split())


def _one_for_each_image(results: Sequence[dict]) -> list[dict]:
    merged: dict[str, dict] = {}
    for result in results:
        file = os.path.abspath(result["file"])
        same = merged.setdefault(file, result | {"prompt": [], "detections": []})
        same["prompt"] += result["prompt"]
        same["detections"] += result["detections"]
    return list(merged.values())


def _boxes(result: dict) -> Iterator[tuple[str, float, tuple[float, float, float, float]]]:
    """(name, score, (x0, y0, x1, y1))"""
    for found in result["detections"]:
        x0, y0, x1, y1 = found["box"]
        x0, y0 = max(x0, 0), max(y0, 0)
        x1, y1 = min(x1, result["width"]), min(y1, result["height"])
        if x1 > x0 and y1 > y0:
            yield one_line(found["phrase"]), found["score"], (x0, y0, x1, y1)


def _whole(low: float, high: float, size: int) -> tuple[int, int]:
    """The nearest whole numbers from 0 to `size`; of those that would be one, the pixel around."""
    first, last = round(low), round(high)
    if first < last:
        return first, last
    first = min(int((low + high) / 2), size - 1)
    return first, first + 1


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder that takes the place of `path` once all is in it; a former one that differs is
    kept, under a number."""
    partial = partial_name(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.is_dir() and _equal(path, partial):
            shutil.rmtree(path)
        elif path.exists():
            numbered = (path.with_name(f"{path.name}.{i}") for i in range(1, 1 << 20))
            path.rename(next(free for free in numbered if not free.exists()))
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _equal(folder: Path, other: Path) -> bool:
    """Whether the same files are in both, with the same content."""
    files, others = (
        {p.relative_to(root): p for p in root.rglob("*") if p.is_file()} for root in (folder, other)
    )
    return files.keys() == others.keys() and all(filecmp.cmp(files[k], others[k]) for k in files)


def _placed(results: Sequence[dict], folder: Path) -> Iterator[tuple[dict, Path]]:
    """Each result and the place of its image in a data set, where it is put."""
    folder.mkdir(exist_ok=True)
    for result, stem in zip(results, _stems([r["file"] for r in results]), strict=True):
        image = folder / (stem + Path(result["file"]).suffix)
        original = os.path.realpath(result["file"])
        try:
            os.link(original, image)
        except OSError:  # another disk, or a file system without links
            shutil.copyfile(original, image)
        yield result, image


def _stems(files: Sequence[str]) -> list[str]:
    """A name for each image, without its ending, unique whatever the case of the letters: its path
    from the folder that all of them lie in."""
    paths = [Path(os.path.abspath(file)) for file in files]
    try:
        root = os.path.commonpath([path.parent for path in paths]) if paths else ""
    except ValueError:  # on several drives of Windows
        root = ""
    taken: set[str] = set()
    stems = []
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts if root else (path.stem,)
        stem = first = _short("__".join(parts).lstrip(".") or "image")
        number = 2
        while stem.casefold() in taken:
            stem, number = f"{first}_{number}", number + 1
        taken.add(stem.casefold())
        stems.append(stem)
    return stems


def _short(stem: str) -> str:
    """Its end, and a number that stands for all of it, where the file system has no room for it."""
    encoded = os.fsencode(stem)
    if len(encoded) <= LONGEST:
        return stem
    return f"{zlib.crc32(encoded):08x}__{encoded[-LONGEST:].decode(errors='ignore')}"


def _elements(parent: ElementTree.Element, **texts: object) -> None:
    for tag, text in texts.items():
        ElementTree.SubElement(parent, tag).text = str(text)


def _write(path: Path, text: str) -> None:
    """One of many files: they are on the disk before their folder has its name."""
    path.write_text(text, encoding="utf-8", newline="\n")


def _relative(file: str, folder: Path) -> str:
    try:
        return Path(os.path.relpath(file, folder)).as_posix()
    except ValueError:  # on another drive of Windows
        return Path(os.path.abspath(file)).as_posix()
