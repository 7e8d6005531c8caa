"""Data sets by name or path, as sequences of Detectron2 records (`Records`).

Built-in names (`builtin.BUILTIN`) live under ``DETECTRON2_DATASETS`` (default ``datasets``); own
data are used by the path of a file or folder, in any format that `formats.recognise` knows, without
code. ``PATH:train``, ``PATH:val`` and ``PATH:test`` are its parts; where it has none, the first two
are those of a split by seed. Each record carries ``dataset_name``, so that several data sets can be
mixed.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from .builtin import BUILTIN, Builtin, Format
from .catalog import dataset_root, format_of_file, replace_metadata
from .coco_json import load_coco_json
from .formats import Recognised, load_recognised, recognise
from .formats.load import parts_of
from .formats.pictures import files_under, find_image_root, is_picture
from .formats.recognise import TITLES, kind_of_file
from .grounding import load_mdetr_json, load_odvg_jsonl
from .json_stream import stream_json, stream_jsonl
from .problems import BadBoxes
from .records import Records
from .split import VAL, split_rows

logger = logging.getLogger(__name__)

LOADERS: dict[Format, Callable[..., Records]] = {
    "coco": load_coco_json,
    "mdetr": load_mdetr_json,
    "odvg": load_odvg_jsonl,
}


@dataclass(frozen=True)
class Place:
    """Where a data set lies, and how it is read. `name` is that of its metadata.

    found      what an annotation tool wrote, None for COCO, MDETR and ODVG
    part       the part that is meant
    own_parts  whether it is one of the data set's own; else it is drawn by seed
    """

    name: str
    file: Path
    image_root: Path
    format: Format
    entry: Builtin | None = None
    found: Recognised | None = None
    part: str | None = None
    own_parts: bool = True

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
        file, images = entry.locate(root or dataset_root())
        return Place(name, file, images, source_format or entry.format_of(file), entry)
    path, part = _split_name(name)
    if path.suffix in (".json", ".jsonl") and not path.is_dir():
        kind = source_format or (kind_of_file(path) if path.is_file() else None)
        kind = kind or format_of_file(path)
        if kind in LOADERS:
            images = Path(image_root) if image_root else path.parent
            return Place(name, path, images, kind, part=part, own_parts=False)
    if not path.exists():
        known = ", ".join(name for name in BUILTIN if not name.startswith("odinw_"))
        raise ValueError(
            f"unknown data set {name!r}: use a built-in name ({known}, odinw_<set>_<split>; all: "
            "`python -m dynamic_dino.data list --all`), a name that you registered, or the path of "
            f"a file or folder that exists ({', '.join(TITLES.values())})"
        )
    found = recognise(path, source_format)
    part, own_parts = _choose_part(path, found, part)
    if found.format not in LOADERS:
        images = Path(image_root) if image_root else found.folder
        return Place(name, path, images, found.format, None, found, part, own_parts)
    file = next(file for tag, file in found.files if not own_parts or tag == part or part is None)
    images = Path(image_root) if image_root else _image_root(file, path, found.format)
    part = None if own_parts else part  # one of its own has a file of its own
    return Place(name, file, images, found.format, part=part, own_parts=own_parts)


def parts_named(name: str) -> list[str]:
    """The names of a data set's parts, such as ``PATH:train``, or the name itself if it has no
    more than one; see `locate_dataset`."""
    path, part = _split_name(name)
    if name in BUILTIN or part or not path.is_dir():
        return [name]
    try:
        parts = parts_of(recognise(path))
    except ValueError:  # whoever loads it says what is wrong
        return [name]
    return [f"{name}:{part}" for part in parts] if len(parts) > 1 else [name]


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


def _split_name(name: str) -> tuple[Path, str | None]:
    match = re.fullmatch(r"(.+):(train|val|trainval|test)", name)
    if match is None or Path(name).exists():
        return Path(name), None
    return Path(match[1]), match[2]


def _choose_part(path: Path, found: Recognised, part: str | None) -> tuple[str | None, bool]:
    """(part, whether it is one of the data set's own)."""
    parts = parts_of(found)
    if part is None and len(parts) > 1:
        names = ", ".join(f"{path}:{name}" for name in parts)
        raise ValueError(f"{path} has the parts {', '.join(parts)}: say which, {names}")
    if part is not None and parts and part not in parts:
        raise ValueError(f"{path} has no part {part!r}, only {', '.join(parts)}")
    return (part or (parts[0] if parts else None)), bool(parts)


def load_file(place: Place, **options: Any) -> Records:
    """Reads what `locate_dataset` found; `options` for the format's reader override the built-in
    ones."""
    entry = place.entry
    built_in = {**entry.options, "remedy": entry.remedy} if entry else {}
    if place.found is None:
        reader = LOADERS[place.format]
        records = reader(place.file, place.image_root, place.name, **{**built_in, **options})
    else:
        part = place.part if place.own_parts else None
        records = load_recognised(place.found, place.image_root, place.name, part, **options)
    if place.part is not None and not place.own_parts:
        records = _drawn_part(records, place)
    if entry is None:
        logger.info("%s: %s", place.name, describe(place, records))
    return records


def describe(place: Place, records: Records) -> str:
    """One line: what a data set was recognised as, what is in it, and what was left out."""
    metadata = MetadataCatalog.get(place.name)
    counts = (
        f"{len(records):,} images, {len(records.boxes):,} boxes, "
        f"{len(metadata.thing_classes):,} names"
    )
    return "; ".join([f"{TITLES[place.format]}: {counts}", *metadata.get("notes", ())])


def _drawn_part(records: Records, place: Place) -> Records:
    """The part of a data set that has none: `split_rows` with its defaults."""
    if place.part not in ("train", "val"):
        raise ValueError(f"{place.file} has no parts, so that only train and val can be drawn")
    train, val = split_rows(records)
    metadata = MetadataCatalog.get(place.name).as_dict()
    notes = [*metadata.pop("notes", ()), f"{VAL:.0%} of the images drawn for val, by seed 0"]
    metadata.pop("name")
    replace_metadata(place.name, **metadata, notes=notes, drawn=True)
    return records.select(train if place.part == "train" else val)


def load_datasets(names: str | Sequence[str]) -> Records | list[Records]:
    """The records of one data set, or a list of them, one entry a data set.

    A name is a registered one or a path, see `locate_dataset`; image file names are then relative
    to its folder.
    """
    if not isinstance(names, str):
        return [load_datasets(name) for name in names]
    if names in DatasetCatalog:
        return DatasetCatalog.get(names)
    return load_file(locate_dataset(names))


def load_own_data(
    file: str | Path, image_root: str | Path | None = None, extra: Sequence[str] = ()
) -> list[Records]:
    """A user's file or folder, of which `file` is also the name in the mapper, and further data
    sets that are mixed in, so that the model keeps what it knows."""
    return [load_file(locate_dataset(str(file), image_root)), *load_datasets(list(extra))]


def get_metadata(name: str) -> Metadata:
    """The data set's metadata with ``thing_classes`` filled in, reading its file where needed."""
    if not hasattr(MetadataCatalog.get(name), "thing_classes"):
        load_datasets(name)
    return MetadataCatalog.get(name)


def register_coco_json(
    name: str,
    json_file: str | Path,
    image_root: str | Path,
    *,
    bad_boxes: BadBoxes = "error",
    clean_names: bool = False,
    remedy: str = "",
) -> None:
    """Makes a COCO-format data set available by name; a name that exists is replaced.

    The file is read when the data set is first used. `remedy` completes the error message that is
    given when it doesn't exist. The other options are those of `load_coco_json`.
    """

    def load() -> Records:
        return load_coco_json(
            json_file,
            image_root,
            name,
            bad_boxes=bad_boxes,
            clean_names=clean_names,
            remedy=remedy,
        )

    _register(name, load, json_file, image_root, "coco")


def register_odvg_jsonl(
    name: str, jsonl_file: str | Path, image_root: str | Path, *, remedy: str = ""
) -> None:
    """Makes a grounding data set in ODVG format available by name, see `register_coco_json`."""

    def load() -> Records:
        return load_odvg_jsonl(jsonl_file, image_root, name, remedy=remedy)

    _register(name, load, jsonl_file, image_root, "grounding")


def register_mdetr_json(
    name: str,
    json_file: str | Path,
    image_root: str | Path,
    *,
    whole_caption: bool = False,
    remedy: str = "",
) -> None:
    """Makes a data set in MDETR's format available by name, see `register_coco_json`.

    `whole_caption` is for referring expressions, see `load_mdetr_json`.
    """
    kind = "refexp" if whole_caption else "grounding"

    def load() -> Records:
        return load_mdetr_json(
            json_file,
            image_root,
            name,
            whole_caption=whole_caption,
            evaluator_type=kind,
            remedy=remedy,
        )

    _register(name, load, json_file, image_root, kind)


def register_builtin(root: str | Path | None = None) -> None:
    """Registers the built-in names under `root` (default: `dataset_root()`), as an import does."""
    root = dataset_root() if root is None else Path(root)
    for entry in BUILTIN.values():
        _register_entry(entry, root)


def _register_entry(entry: Builtin, root: Path) -> None:
    def load() -> Records:  # the file is looked for again: it may have come since
        return load_file(locate_dataset(entry.name, root=root))

    kind = entry.options.get("evaluator_type")
    _register(entry.name, load, *entry.locate(root), kind or _KINDS[entry.format])


_KINDS = {"coco": "coco", "mdetr": "grounding", "odvg": "grounding"}


def _register(
    name: str, load: Callable[[], Records], file: str | Path, image_root: str | Path, kind: str
) -> None:
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
    replace_metadata(name, json_file=str(file), image_root=str(image_root), evaluator_type=kind)
    DatasetCatalog.register(name, load)


register_builtin()  # on import, as Detectron2 does: configs and evaluators name data sets by string
