"""Where a data set lies: built-in names, and paths of files and folders with their parts.

``PATH:train``, ``PATH:val`` and ``PATH:test`` are the parts of a path. Where it has no val of its
own, the first two are drawn from its images by seed, always in the same way.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from ..remote import address, exists, fetch
from .builtin import BUILTIN, Builtin, Format
from .catalog import dataset_root, format_of_file
from .formats.load import parts_of
from .formats.recognise import TITLES, Recognised, find_image_root, kind_of_file, recognise
from .image_files import files_under, is_picture
from .json_stream import stream_json, stream_jsonl
from .label_map import NAME as LABEL_MAP

IN_ONE_FILE = ("coco", "mdetr", "odvg")  # read without what `recognise` finds


@dataclass(frozen=True)
class Place:
    """Where a data set lies, and how it is read. `name` is that of its metadata.

    found  what an annotation tool wrote, None for COCO, MDETR and ODVG
    part   the part of it that is read, None for all
    drawn  "train" or "val": that share of it, by seed
    """

    name: str
    file: Path
    image_root: Path
    format: Format
    entry: Builtin | None = None
    found: Recognised | None = None
    part: str | None = None
    drawn: str | None = None

    @property
    def annotation_files(self) -> list[Path]:
        """Whose content tells whether the data set is the same."""
        if self.found is None:
            return [self.file]
        if self.format == "yolo":  # the labels, not only what names them
            return [path for path in files_under(self.found.folder) if not is_picture(path)]
        return [file for _, file in self.found.files]


def locate_dataset(
    name: str,
    image_root: str | Path | None = None,
    source_format: Format | None = None,
    root: Path | None = None,
) -> Place:
    """The place of a built-in name or of a path, with ``:train``, ``:val`` or ``:test`` behind it
    if a part is meant. Images of a path are in `image_root` (default: the folder, or that of the
    file). `source_format`: files of other formats don't count.

    Raises ValueError for what isn't known, and for a folder of several parts of which none is said.
    """
    if name in BUILTIN:
        entry = BUILTIN[name]
        root = root or dataset_root()
        file, images = entry.locate(root)
        if address(root):
            file, images = _fetch_builtin(entry, root)
        return Place(name, file, images, source_format or entry.format_of(file), entry)
    path, part = _split_name(name)
    if url := address(path):
        return _locate_remote(name, url, part, image_root, source_format)
    if path.suffix.lower() in (".json", ".jsonl") and not path.is_dir():
        kind = source_format or (kind_of_file(path) if path.is_file() else None)
        kind = kind or format_of_file(path)  # its reader says what is wrong with the file
        if kind in IN_ONE_FILE:
            images = Path(image_root) if image_root else path.parent
            _, drawn = _choose_part(path, [], part)
            return Place(name, path, images, kind, drawn=drawn)
    if not path.exists():
        known = ", ".join(name for name in BUILTIN if not name.startswith("odinw_"))
        raise ValueError(
            f"unknown data set {name!r}: there is no file or folder {str(path)!r}. Use a path "
            f"({', '.join(TITLES.values())}), a name that you registered, or a built-in one "
            f"({known}, odinw_<set>_<split>; all: `python -m dynamic_dino.data list --all`)"
        )
    found = recognise(path, source_format)
    part, drawn = _choose_part(path, parts_of(found), part)
    if found.format not in IN_ONE_FILE:
        images = Path(image_root) if image_root else found.folder
        return Place(name, path, images, found.format, None, found, part, drawn)
    file = next(file for tag, file in found.files if part in (None, tag))
    images = Path(image_root) if image_root else _image_root(file, path, found.format)
    return Place(name, file, images, found.format, drawn=drawn)


def _locate_remote(
    name: str,
    url: str,
    part: str | None,
    image_root: str | Path | None,
    source_format: Format | None,
) -> Place:
    """Annotations become a local file, images are read where they are. A folder is one of shards,
    whose annotations have a name that is known (`shards`)."""
    folder, files = url.rpartition("/")[0], [url]
    if not url.lower().endswith((".json", ".jsonl")):
        folder = url.rstrip("/")
        files = [f"{folder}/annotations.json", f"{folder}/annotations.jsonl"]
        files = [file for file in files if exists(file)]
    if not files:
        raise ValueError(
            f"{url} is no .json or .jsonl file, and no folder of shards: name the file of its "
            "annotations, or convert it where it is a local folder (`python -m dynamic_dino.data "
            "convert` or `shard`)"
        )
    file = fetch(files[0], [LABEL_MAP] if files[0].lower().endswith(".jsonl") else [])
    kind = source_format or kind_of_file(file) or format_of_file(file)
    if kind not in IN_ONE_FILE:
        raise ValueError(
            f"{url} is {TITLES[kind]}, of which only local files are read: convert it with `python "
            "-m dynamic_dino.data convert`"
        )
    _, drawn = _choose_part(Path(url), [], part)
    return Place(name, file, Path(image_root or folder), kind, drawn=drawn)


def find_builtin(entry: Builtin, root: Path) -> tuple[Path, bool]:
    """The annotations of a built-in data set, and whether they are there, also at an address."""
    file, _ = entry.locate(root)
    if not address(root):
        return file, file.is_file()
    there = (root / name for name, _ in entry.files if exists(address(root / name) or ""))
    file = next(there, None)
    return file or root / entry.files[0][0], file is not None


def _fetch_builtin(entry: Builtin, root: Path) -> tuple[Path, Path]:
    """`Builtin.locate` where the data sets are at an address."""
    file, found = find_builtin(entry, root)
    url = address(file) or ""
    if not found:
        raise FileNotFoundError(
            f"{url} does not exist: {entry.remedy} (data sets are looked for under "
            "DETECTRON2_DATASETS)"
        )
    images = next(images for name, images in entry.files if root / name == file)
    return fetch(url, [LABEL_MAP] if url.endswith(".jsonl") else []), root / images


def parts_named(name: str) -> list[str]:
    """The names of a data set's parts, such as ``PATH:train``, or the name itself if it has no
    more than one; see `locate_dataset`."""
    path, part = _split_name(name)
    if name in BUILTIN or part or not path.exists():
        return [name]
    try:
        parts = parts_of(recognise(path))
    except ValueError:  # whoever loads it says what is wrong
        return [name]
    return [f"{name}:{part}" for part in parts] if len(parts) > 1 else [name]


def _split_name(name: str) -> tuple[Path, str | None]:
    match = re.fullmatch(r"(.+):(train|val|trainval|test)", name)
    if match is None or Path(name).exists():
        return Path(name), None
    return Path(match[1]), match[2]


def _choose_part(path: Path, parts: list[str], part: str | None) -> tuple[str | None, str | None]:
    """(its own part that is read, which share of that is drawn); `part` is what was asked for."""
    if part is None and len(parts) > 1:
        names = ", ".join(f"{path}:{name}" for name in parts)
        raise ValueError(f"{path} has the parts {', '.join(parts)}: say which, {names}")
    if part in ("train", "val") and "val" not in parts and (not parts or "train" in parts):
        return ("train" if parts else None), part
    if part is not None and part not in parts:
        raise ValueError(
            f"{path} has no part {part!r}, only {', '.join(parts)}"
            if parts
            else f"{path} has no parts, and only train and val can be drawn from it"
        )
    return part or (parts[0] if parts else None), None


def _image_root(file: Path, folder: Path, kind: Format) -> Path:
    """Where the images of an annotation file in a folder are."""
    first: dict = {}
    with contextlib.suppress(ValueError):  # the reader says what is wrong with it
        if kind == "odvg":
            first = next((line for _, line in stream_jsonl(file, progress=False)), {})
        else:
            items = stream_json(file, ["images"], progress=False)
            first = next((item for *_, item in items), {})
    name = first.get("file_name") or first.get("filename") if isinstance(first, dict) else None
    return find_image_root(file, name, folder) if isinstance(name, str) else file.parent
