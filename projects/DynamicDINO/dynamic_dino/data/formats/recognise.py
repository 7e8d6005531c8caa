"""Saying what a file or folder is, by what is in it."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..builtin import Format
from ..catalog import format_of_file
from ..image_files import files_under
from ..json_stream import JsonError, keys_of, require_json, stream_json_list
from ..problems import DataError
from .xml import read_xml, root_tag

TITLES: dict[Format, str] = {
    "coco": "COCO JSON",
    "mdetr": "MDETR JSON",
    "odvg": "ODVG JSONL",
    "voc": "Pascal VOC XML",
    "yolo": "YOLO txt",
    "labelme": "LabelMe JSON",
    "cvat": "CVAT XML",
    "labelstudio": "Label Studio JSON",
    "csv": "CSV",
}
ROOTS: dict[str, Format] = {"annotation": "voc", "annotations": "cvat"}
FILE_AN_IMAGE = ("voc", "yolo", "labelme")
ENDINGS = (".xml", ".json", ".jsonl", ".txt", ".yaml", ".yml", ".csv")
HEAD = 4096  # bytes; the first lines of a file
YOLO_LINE = re.compile(r"\d+(\.0+)?(\s+[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?){4,}")
LABEL_STUDIO_NAMES = ("rectanglelabels", "polygonlabels", "ellipselabels", "labels")
LABEL_STUDIO_FIELDS = {"annotations", "completions", "predictions"}
PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
RETINANET = ["image", "xmin", "ymin", "xmax", "ymax", "class"]
COLUMNS = {
    "image": ("filename", "file_name", "image", "image_path", "path", "image_id", "img", "frame"),
    "class": ("class", "label", "name", "category", "class_name", "label_name"),
    "xmin": ("xmin", "x_min", "x1", "left"),
    "ymin": ("ymin", "y_min", "y1", "top"),
    "xmax": ("xmax", "x_max", "x2", "right"),
    "ymax": ("ymax", "y_max", "y2", "bottom"),
    "width": ("width", "image_width", "img_width"),
    "height": ("height", "image_height", "img_height"),
}


@dataclass(frozen=True)
class Recognised:
    """What was found at `path`: annotation files, each with the part ("train", "val", "test") that
    its name or folder says, or None."""

    format: Format
    path: Path
    files: tuple[tuple[str | None, Path], ...]

    @property
    def folder(self) -> Path:
        """Where images are looked for."""
        return self.path if self.path.is_dir() else self.path.parent


def recognise(path: Path, only: Format | None = None) -> Recognised:
    """What a file or folder is. `only`: files of other formats don't count.

    Raises ValueError, naming what was found, for nothing that is known or for two data sets.
    """
    if path.is_file():
        kind = kind_of_file(path)
        if kind is None and _broken([path], ".xml"):
            raise ValueError(f"{path} is not valid XML: it may be truncated; export it again")
        if kind == "yolo" and path.suffix.lower() == ".txt":
            raise ValueError(f"{path} has YOLO labels of one image: name the folder of all")
        if kind is None or only not in (None, kind):
            raise ValueError(_unknown(path, [path]))
        return Recognised(kind, path, ((None, path),))
    found: dict[Format, list[Path]] = {}
    kinds = {file: kind_of_file(file) for file in files_under(path)}
    for file, kind in kinds.items():
        if kind is not None and only in (None, kind):
            found.setdefault(kind, []).append(file)
    if not found:
        raise ValueError(_unknown(path, list(kinds)))
    if len(found) > 1:
        sets = ", ".join(
            f"{TITLES[kind]} ({these[0].relative_to(path)}"
            + (f" and {len(these) - 1:,} more)" if len(these) > 1 else ")")
            for kind, these in found.items()
        )
        raise ValueError(
            f"{path} holds more than one data set: {sets}. Name the file or the folder of one"
        )
    ((kind, these),) = found.items()
    if kind in ("voc", "labelme"):
        unknown = [file for file, kind in kinds.items() if kind is None]
        these = sorted([*these, *_broken(unknown, ".xml" if kind == "voc" else ".json")])
    settings = [file for file in these if kind == "yolo" and file.suffix in (".yaml", ".yml")]
    if settings:
        these = settings
    tagged = [(_part_of_file(file, path, kind), file) for file in these]
    if kind not in FILE_AN_IMAGE or settings:
        _require_one_a_part(path, kind, tagged)
    tags = {part for part, _ in tagged}
    if None in tags and len(tags) > 1:
        odd = next(file for part, file in tagged if part is None)
        parts = ", ".join(sorted(part for part in tags if part))
        raise ValueError(
            f"{path}: some of the {TITLES[kind]} files lie in parts ({parts}), others, such as "
            f"{odd.relative_to(path)}, in none: name the folder of one part"
        )
    return Recognised(kind, path, tuple(tagged))


def kind_of_file(path: Path) -> Format | None:
    """The format of one annotation file, None for anything else."""
    if path.suffix.lower() not in ENDINGS:
        return None
    with path.open("rb") as file:
        head = file.read(HEAD)
    head = head.decode(json.detect_encoding(head), errors="replace").lstrip()
    if head.startswith("<"):
        return ROOTS.get(root_tag(path) or "")
    if head.startswith("{"):
        return _kind_of_object(path)
    if head.startswith("["):
        return _kind_of_list(path)
    if path.suffix.lower() in (".yaml", ".yml"):
        return "yolo" if _is_settings(path) else None
    first = head.splitlines()[0].strip() if head else ""
    if YOLO_LINE.fullmatch(first):
        return "yolo"
    return "csv" if _is_csv(first) else None


def _broken(files: list[Path], ending: str) -> list[Path]:
    """Of files that aren't known, the XML or JSON files that can't be parsed. Among files of a
    format they are taken for such, so that the reader reports them."""
    whole = _is_json if ending == ".json" else _is_xml
    return [path for path in files if path.suffix.lower() == ending and not whole(path)]


def _is_json(path: Path) -> bool:
    try:
        require_json(path)
    except JsonError:
        return False
    return True


def _is_xml(path: Path) -> bool:
    try:
        read_xml(path)
    except DataError:
        return False
    return True


def named_part(word: str) -> str | None:
    """ "train2017" -> "train", "valid" -> "val"."""
    word = re.sub(r"[-_]?\d*$", "", word.lower())
    return next((part for part, words in PARTS.items() if word in words), None)


def part_of(path: Path, root: Path) -> str | None:
    """The part that a folder between `root` and the file says."""
    folders = path.relative_to(root).parts[:-1] if path.is_relative_to(root) else ()
    return next((part for name in reversed(folders) if (part := named_part(name))), None)


def find_image_root(file: Path, name: str, folder: Path) -> Path:
    """The folder to which the names of an annotation file's images are relative: its own one, else
    that below `folder` in which its first image, `name`, lies. Of several, that of its part counts.

    Raises ValueError if several may be meant.
    """
    if (file.parent / name).is_file():
        return file.parent
    found = [path for path in files_under(folder) if path.as_posix().endswith("/" + name)]
    part = _part_of_file(file, folder, "coco")
    found = [path for path in found if part and part_of(path, folder) == part] or found
    if len(found) > 1:
        raise ValueError(
            f"{file}: its image {name!r} may be {found[0]} or {found[1]}: say the folder of the "
            "images"
        )
    return Path(found[0].as_posix().removesuffix(name)) if found else file.parent


def csv_columns(line: str) -> tuple[list[str | None] | None, str]:
    """(what each column is, None for one that isn't read; None without a header), delimiter."""
    delimiter = max(",;\t", key=line.count)
    cells = [cell.strip().lower() for cell in next(csv.reader([line], delimiter=delimiter), [])]
    meaning = {alias: key for key, aliases in COLUMNS.items() for alias in aliases}
    columns = [meaning.get(cell) for cell in cells]
    return (columns if set(RETINANET) <= set(columns) else None), delimiter


def _part_of_file(file: Path, root: Path, kind: Format) -> str | None:
    """Of a file for all images its own name counts first, as in instances_val2017.json."""
    if kind not in FILE_AN_IMAGE:
        for word in re.findall(r"[a-z]+", file.stem.lower()):
            if part := named_part(word):
                return part
    return part_of(file, root)


def _require_one_a_part(path: Path, kind: Format, tagged: list) -> None:
    for part, count in Counter(part for part, _ in tagged).items():
        if count > 1:
            names = ", ".join(str(f.relative_to(path)) for p, f in tagged if p == part)
            what = f"for the part {part!r}" if part else "that say no part"
            raise ValueError(
                f"{path} holds {count} files of {TITLES[kind]} {what}: {names}. Name one of them"
            )


def _unknown(path: Path, files: list[Path]) -> str:
    endings = Counter(file.suffix.lower() or "no ending" for file in files)
    seen = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common(6))
    unpack = ". Unpack the .zip first" if ".zip" in endings else ""
    return (
        f"{path} holds no annotations that can be read (found: {seen or 'no file'}). Supported: "
        f"{', '.join(TITLES.values())}; see docs/data.md for what each must have{unpack}"
    )


def _kind_of_object(path: Path) -> Format | None:
    with contextlib.suppress(JsonError):
        for key in keys_of(path):
            if key in ("images", "annotations"):
                return format_of_file(path)
            if key in ("shapes", "imagePath", "imageData"):
                return "labelme"
            if key in ("detection", "grounding"):
                return "odvg"
    return None


def _kind_of_list(path: Path) -> Format | None:
    """Label Studio's tasks: of JSON {"data": ..., "annotations": ...}; of JSON-MIN, where the lists
    of shapes stand beside the image, with the fields that it adds to each task."""
    task = None
    with contextlib.suppress(JsonError):
        task = next(stream_json_list(path, progress=False), None)
    if not isinstance(task, dict):
        return None
    if isinstance(task.get("data"), dict) and task.keys() & LABEL_STUDIO_FIELDS:
        return "labelstudio"
    lists = (items for items in task.values() if isinstance(items, list))
    shapes = (item for items in lists for item in items if isinstance(item, dict))
    if {"annotation_id", "annotator"} <= task.keys():
        return "labelstudio"
    return "labelstudio" if any(s.keys() & set(LABEL_STUDIO_NAMES) for s in shapes) else None


def _is_settings(path: Path) -> bool:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeError):
        return False
    fields = {"train", "val", "valid", "test", "path", "nc"}
    return isinstance(settings, dict) and "names" in settings and bool(fields & settings.keys())


def _is_csv(line: str) -> bool:
    columns, delimiter = csv_columns(line)
    if columns is not None:
        return True
    cells = next(csv.reader([line], delimiter=delimiter), [])
    if len(cells) != len(RETINANET) or not cells[0].strip():
        return False
    return all(re.fullmatch(r"\s*-?\d*\.?\d*\s*", cell) for cell in cells[1:5])
