"""Data sets by name or path, as sequences of Detectron2 records (`Records`).

Built-in names (`builtin.BUILTIN`) live under ``DETECTRON2_DATASETS`` (default ``datasets``); own
data are used by the path of a file or folder, in any format that `formats.recognise` knows, without
code; see `places`. Each record carries ``dataset_name``, so that several data sets can be mixed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from .builtin import BUILTIN, Builtin, Format
from .catalog import dataset_root, replace_metadata
from .coco_json import load_coco_json
from .formats import load_recognised
from .formats.recognise import TITLES
from .grounding import load_mdetr_json, load_odvg_jsonl
from .label_map import NAME as LABEL_MAP
from .places import Place, locate_dataset
from .problems import BadBoxes, DataError
from .record_cache import kept_records
from .records import Records
from .split import VAL, split_rows
from .whereabouts import with_found_images

logger = logging.getLogger(__name__)

LOADERS: dict[Format, Callable[..., Records]] = {
    "coco": load_coco_json,
    "mdetr": load_mdetr_json,
    "odvg": load_odvg_jsonl,
}


def load_file(place: Place, **options: Any) -> Records:
    """Reads what `locate_dataset` found; `options` for the format's reader override the built-in
    ones."""
    entry = place.entry
    built_in = {**entry.options, "remedy": entry.remedy} if entry else {}
    if place.found is None:
        records = _read(place, {**built_in, **options})
    else:
        records = load_recognised(place.found, place.image_root, place.name, place.part, **options)
    if entry is None:
        records, elsewhere = with_found_images(records)
        if report := options.get("report"):
            for what in elsewhere:
                report(DataError("image found elsewhere", what, str(place.file)))
        else:
            more = [f"{len(elsewhere) - 3} more such folders"] if len(elsewhere) > 3 else []
            _add_notes(place.name, [*elsewhere[:3], *more])
    if place.drawn is not None:
        records = _drawn(records, place)
    if entry is None:
        logger.info("%s: %s", place.name, describe(place, records))
    return records


def _read(place: Place, options: dict[str, Any]) -> Records:
    """What lies in one file, from the cache of records if nothing else is asked for."""

    def read() -> Records:
        return LOADERS[place.format](place.file, place.image_root, place.name, **options)

    if options.get("report") or options.get("sizes_of_images"):
        return read()
    names = place.file.with_name(LABEL_MAP)
    beside = [names] if place.format == "odvg" and names.is_file() else []
    where = {"name": place.name, "format": place.format, "image_root": str(place.image_root)}
    return kept_records([place.file, *beside], where | options, read)


def describe(place: Place, records: Records) -> str:
    """One line: what a data set was recognised as, what is in it, and what was left out."""
    metadata = MetadataCatalog.get(place.name)
    counts = (
        f"{len(records):,} images, {len(records.boxes):,} boxes, "
        f"{len(metadata.thing_classes):,} names"
    )
    notes = list(metadata.get("notes", ()))
    if unasked := [metadata.thing_classes[i] for i in unasked_classes(place.name)]:
        first = ", ".join(map(repr, unasked[:3])) + (", ..." if len(unasked) > 3 else "")
        notes.append(f"{len(unasked):,} names have no box and aren't asked for ({first})")
    return "; ".join([f"{TITLES[place.format]}: {counts}", *notes])


def unasked_classes(name: str) -> list[int]:
    """The classes that a data set has no box of, and that are therefore no negatives in training
    and not in the prompts of an evaluation: exporters put names of groups among the classes, whose
    members an image shows. In built-in data sets every class counts: their protocols ask for all.
    """
    return [] if name in BUILTIN else list(get_metadata(name).get("without_boxes", ()))


def _drawn(records: Records, place: Place) -> Records:
    """The images that `split_rows`, with its defaults, gives to train or val."""
    train, val = split_rows(records)
    _add_notes(place.name, [f"{VAL:.0%} of the images drawn for val, by seed 0"], drawn=True)
    return records.select(train if place.drawn == "train" else val)


def _add_notes(name: str, notes: list[str], **fields: Any) -> None:
    """To the metadata, which `describe` says."""
    known = MetadataCatalog.get(name).as_dict()
    known |= {"notes": [*known.get("notes", ()), *notes], **fields}
    replace_metadata(known.pop("name"), **known)


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
