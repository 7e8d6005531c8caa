"""YOLO: a text file an image, a line a box: "class x_center y_center width height", parts of the
image's size, as Ultralytics, Roboflow, CVAT, labelImg and Label Studio write them.

Names come from a data.yaml (`names`, `path`, `train`, `val`, `test`), else from classes.txt,
obj.names or _darknet.labels. A line of seven or more numbers is a polygon, of which the box is
taken; with `kpt_shape` in data.yaml, keypoints follow the box. As Ultralytics has it, an image
lies in .../images/... and its labels in .../labels/... or beside it, and an image without a label
file has no objects.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..fields import brief
from ..image_files import files_under, is_picture
from ..problems import DataError
from ..whereabouts import find_path
from .collector import Collector
from .recognise import YOLO_LINE, Recognised, part_of
from .text import read_lines, read_text

NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels")
LEVELS_UP = 3  # how far above the labels the names are looked for
FAR = 1.1  # a coordinate beyond this is no part of an image


def read(found: Recognised, into: Collector) -> None:
    file = found.files[0][1]
    if file.suffix in (".yaml", ".yml"):
        settings = read_settings(file)
        names = _names_of(file, settings)
        parts = parts_of_settings(file, settings)
        listed = _listed_images(file, settings, parts, into)
        images = list(listed) if parts else into.pictures.all
    else:
        settings = {}
        file, names = _find_names(found)
        images = [p for p in into.pictures.all if into.wants(part_of(p, found.path))]
    for name in names:
        into.name(name)
    poses = settings.get("kpt_shape") is not None
    known = set()
    for image in images:
        labels = label_file(image)
        known.add(labels)
        try:
            index = into.image(image, str(image))
        except DataError as error:
            into.problem(error, str(image))
            continue
        if not labels.is_file():
            into.notes["{n} images without a label file, taken as empty"] += 1
            continue
        try:
            _read_labels(labels, index, names, file, poses, into)
        except DataError as error:
            into.problem(error, str(labels))
    stems = {image.stem for image in into.pictures.all + images}
    for labels in _labels_beside(images, found, into):
        if labels not in known and labels.stem not in stems:
            what = f"there is no image {labels.stem!r} for it: add the image or remove the labels"
            into.report(DataError("missing image", what, str(labels)))


def read_settings(file: Path) -> dict[str, Any]:
    """A data.yaml; raises DataError."""
    try:
        settings = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        what = f"not valid YAML ({error}): correct it"
        raise DataError("unreadable file", what, str(file)) from None
    if not isinstance(settings, dict):
        what = "it has no fields: write names, train and val"
        raise DataError("unreadable file", what, str(file))
    return settings


def parts_of_settings(file: Path, settings: dict[str, Any]) -> dict[str, list[str]]:
    """Part -> the folders, or lists of images, that a data.yaml names for it; raises DataError."""
    parts = {}
    for part in ("train", "val", "test"):
        entries = settings.get(part)
        if entries in (None, "") and part == "val":
            entries = settings.get("valid")
        if not isinstance(entries, list):
            entries = [] if entries in (None, "") else [entries]
        if not all(isinstance(entry, str) for entry in entries):
            what = f"{part!r} is {brief(settings.get(part))}: write a folder, or a list of them"
            raise DataError("missing field", what, str(file))
        if entries:
            parts[part] = entries
    return parts


def label_file(image: Path) -> Path:
    """.../images/a.jpg -> .../labels/a.txt, else the .txt beside the image."""
    folders = list(image.parent.parts)
    for i in range(len(folders) - 1, -1, -1):
        if folders[i] == "images":
            there = Path(*folders[:i], "labels", *folders[i + 1 :], f"{image.stem}.txt")
            beside = image.with_suffix(".txt")
            return beside if beside.is_file() and not there.is_file() else there
    return image.with_suffix(".txt")


def _place(file: Path, settings: dict, part: str, entry: str) -> Path:
    """Where an entry of a data.yaml lies; raises DataError where nothing is. Roboflow writes
    ../train/images for train/images."""
    root = str(settings.get("path") or "")
    plain = re.sub(r"^(\.\./)+", "", entry)
    here = file.parent
    tried = (here / root / entry, here / entry, here / plain, Path(root, entry))
    # os.path's says False, where Path's raises, of a path that can't be
    there = next(filter(os.path.exists, tried), None) or find_path(entry, here)
    if there is None:
        below = f" below {brief(root)} (path)" if root else ""
        what = (
            f"{part!r} names {brief(entry)}, and nothing is there{below}: correct it, or remove it "
            f"where there is no such part; what is relative is looked for in {here}"
        )
        raise DataError("missing image", what, str(file))
    return Path(os.path.normpath(there))


def _listed_images(
    file: Path, settings: dict, parts: dict[str, list[str]], into: Collector
) -> Iterator[Path]:
    seen = set()
    for part, entries in parts.items():
        for entry in entries if into.wants(part) else ():
            for image in _images_at(_place(file, settings, part, entry)):
                if image not in seen:
                    seen.add(image)
                    yield image


def _images_at(place: Path) -> Iterator[Path]:
    """The images of a folder, or of a text file that lists them."""
    if place.is_dir():
        yield from (path for path in files_under(place) if is_picture(path))
        return
    for name in read_lines(place):
        yield Path(os.path.normpath(find_path(name, place.parent) or place.parent / name))


def _names_of(file: Path, settings: dict) -> list[str]:
    names = settings.get("names")
    if isinstance(names, dict):
        try:
            names = {int(key): name for key, name in names.items()}
        except ValueError:
            names = {}
        names = [names.get(i) for i in range(len(names))]
    # digits have no quotes in YAML; true, a list or NaN are no name
    named = isinstance(names, list) and all(isinstance(n, str) or type(n) is int for n in names)
    if not named or not names:
        what = f"'names' is {str(settings.get('names'))[:60]}: list the name of every class, from 0"
        raise DataError("missing field", what, str(file))
    return [str(name).strip() for name in names]


def _find_names(found: Recognised) -> tuple[Path, list[str]]:
    """The file with the names, and these, of labels without a data.yaml: in their folder, else in
    the nearest one above."""
    folder = found.path
    files = [path for path in files_under(folder) if path.name in NAME_FILES]
    for above in list(folder.absolute().parents)[:LEVELS_UP]:
        if files:
            break
        for name in ("data.yaml", "dataset.yaml"):
            if (above / name).is_file() and "names" in (settings := read_settings(above / name)):
                return above / name, _names_of(above / name, settings)
        files = [above / name for name in NAME_FILES if (above / name).is_file()]
    if not files:
        raise DataError(
            "missing field",
            f"the labels in {folder} number their classes, and nothing names them: add a data.yaml "
            "with 'names', or a classes.txt with a name a line",
        )
    lists = [read_lines(path) for path in files]
    if any(names != lists[0] for names in lists):
        what = f"{files[0]} and {files[-1]} name the classes in two ways: keep one of them"
        raise DataError("ambiguous names", what)
    return files[0], lists[0]


def _read_labels(
    labels: Path, image: int, names: list[str], source: Path, poses: bool, into: Collector
) -> None:
    width, height = into.size_of(image)
    for i, line in enumerate(read_text(labels).splitlines()):
        if not line.strip():
            continue
        where = f"{labels}, line {i + 1}"
        try:
            name, values = _read_line(line, names, source, poses)
        except DataError as error:
            into.problem(error, where)
            continue
        if len(values) == 4 or poses:
            x, y, w, h = values[:4]
            points = [(x - w / 2, y - h / 2), (x + w / 2, y + h / 2)]
        else:
            points = list(zip(values[::2], values[1::2], strict=True))
        # a hundredth of a pixel: files have five or six digits of a part
        pixels = [(round(x * width, 2), round(y * height, 2)) for x, y in points]
        into.hull(image, name, pixels, where)


def _read_line(line: str, names: list[str], source: Path, poses: bool) -> tuple[str, list[float]]:
    if not YOLO_LINE.fullmatch(line.strip()):
        raise DataError(
            "malformed box",
            f"{line.strip()[:60]!r} is not 'class x_center y_center width height' or 'class x y "
            "x y x y ...': correct or remove it",
        )
    first, *rest = line.split()
    values = [float(v) for v in rest]
    if not poses and len(values) % 2:
        raise DataError(
            "malformed box",
            f"it has {len(values)} numbers after the class, a box has 4: is the last a confidence, "
            "and are these predictions? Remove it",
        )
    shape = values[:4] if poses else values
    if max(shape) > FAR or min(shape) < 1 - FAR:
        odd = max(shape, key=abs)
        raise DataError(
            "boxes not in parts of the image",
            f"{odd:g} is beyond the image: numbers are parts of its width and height, 0 to 1, not "
            "pixels; correct or remove it",
        )
    index = int(float(first))
    if index >= len(names):
        raise DataError(
            "unknown category",
            f"class {index} is not among the names of {source} (0 to {len(names) - 1}): add its "
            "name or remove the line",
        )
    return names[index], values


def _labels_beside(images: list[Path], found: Recognised, into: Collector) -> Iterator[Path]:
    """The label files of the folders in which those of the images lie."""
    if found.files[0][1].suffix in (".yaml", ".yml"):
        folders = {label_file(image).parent for image in images}
        for folder in sorted(folders):
            yield from (p for p in sorted(folder.glob("*.txt")) if _has_labels(p))
        return
    for part, file in found.files:
        if into.wants(part):
            yield file


def _has_labels(file: Path) -> bool:
    with file.open(encoding="utf-8", errors="replace") as lines:
        return bool(YOLO_LINE.fullmatch(next(lines, "").strip()))
