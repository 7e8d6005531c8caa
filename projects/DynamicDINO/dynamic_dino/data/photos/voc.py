"""groceries and animals25: from a checkout of the repository that publishes their boxes as Pascal
VOC files, the photos beside them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tqdm import tqdm

from ...files import write_text
from ..formats.xml import number, read_xml, text_of
from ..image_files import SUFFIXES
from ..problems import DataError
from .scaling import scaled_size, write_scaled
from .sets import PhotosError, layout

CORNERS = ("xmin", "ymin", "xmax", "ymax")
# What a person would say, and one name for one thing.
RENAMED = {"human": "person", "chimp": "chimpanzee", "chicken": "hen"}


@cache
def voc_ids() -> dict[str, dict[str, dict[str, list[str]]]]:
    """set -> split -> folder -> the names of its files, without their ending."""
    return json.loads(Path(__file__).with_name("voc_ids.json").read_text())


def build_voc(
    name: str,
    checkout: Path,
    target: Path,
    splits: dict[str, dict[str, list[str]]],
    progress: bool = True,
) -> None:
    """Writes set `name` into `target`: the photos of `splits`, then train.json and val.json.

    Files are found by their folder and name, wherever they stand in the checkout. Photos that an
    interrupted run wrote are kept. Boxes without a size are left out.

    Raises `PhotosError` if files are missing, or can't be read.
    """
    wanted = {
        split: [f"{folder}/{stem}" for folder in folders for stem in folders[folder]]
        for split, folders in splits.items()
    }
    every = [key for keys in wanted.values() for key in keys]
    boxes, pictures = _index(checkout, (".xml",)), _index(checkout, SUFFIXES)
    if lost := [key for key in every if key not in boxes or key not in pictures]:
        raise PhotosError(
            f"{checkout} lacks {len(lost)} of {len(every)} pictures of {name} or their XML, the "
            f"first {lost[0]}: is it a whole checkout?\n{layout(name)}"
        )
    bar = tqdm(total=len(every), unit="photo", desc=name, disable=not progress)
    with bar:
        found = {key: [] for key in every}
        sizes = {}
        for key in every:
            try:
                found[key], sizes[key] = _read(boxes[key])
            except DataError as error:
                raise PhotosError(f"{boxes[key]}: {error}") from error
            photo = target / "images" / _file_name(key)
            if not photo.is_file():
                content = pictures[key].read_bytes()
                write_scaled(photo, content, *sizes[key], str(pictures[key]))
            bar.update()
    names = sorted({phrase for objects in found.values() for phrase, _ in objects})
    for split, keys in wanted.items():
        document = _document(keys, found, sizes, names)
        write_text(target / f"{split}.json", json.dumps(document))


def _index(folder: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    """ "folder/name" -> file, of all files with these endings."""
    files = (file for file in sorted(folder.rglob("*")) if file.suffix.lower() in endings)
    return {f"{file.parent.name}/{file.stem}": file for file in files}


def _file_name(key: str) -> str:
    return key.replace("/", "_") + ".jpg"


def _read(file: Path) -> tuple[list[tuple[str, list[float]]], tuple[int, int]]:
    """Names and boxes [x1, y1, x2, y2] of a file, and (width, height); raises DataError."""
    root = read_xml(file)
    objects = []
    for item in root.iter("object"):
        phrase = text_of(item, "name").replace("_", " ")
        corners = [number(text_of(item, f"bndbox/{c}"), f"<{c}>") for c in CORNERS]
        if corners[2] > corners[0] and corners[3] > corners[1]:
            objects.append((RENAMED.get(phrase, phrase), corners))
    width, height = (int(number(text_of(root, f"size/{s}"), s)) for s in ("width", "height"))
    return objects, (width, height)


def _document(keys: list[str], found: dict, sizes: dict, names: list[str]) -> dict:
    """COCO JSON of the scaled photos."""
    category = {phrase: i for i, phrase in enumerate(names, start=1)}
    images, annotations = [], []
    for i, key in enumerate(keys, start=1):
        width, height = scaled_size(*sizes[key])
        size = {"width": width, "height": height}
        images.append({"id": i, "file_name": _file_name(key)} | size)
        x, y = width / sizes[key][0], height / sizes[key][1]
        for phrase, (x1, y1, x2, y2) in found[key]:
            box = [round(v, 2) for v in (x1 * x, y1 * y, (x2 - x1) * x, (y2 - y1) * y)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": category[phrase],
                    "bbox": box,
                    "area": round(box[2] * box[3], 2),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": j, "name": phrase} for phrase, j in category.items()]
    return {"images": images, "annotations": annotations, "categories": categories}
