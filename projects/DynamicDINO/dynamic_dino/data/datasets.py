"""Data sets by name or path, as sequences of Detectron2 records (`Records`).

Built-in names (`builtin.BUILTIN`) live under ``DETECTRON2_DATASETS`` (default ``datasets``); any
COCO JSON, MDETR JSON or ODVG JSONL file can be used by its path, without code. Each record carries
``dataset_name``, so that several data sets can be mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from .builtin import BUILTIN, Builtin, Format
from .catalog import dataset_root, format_of_file, replace_metadata
from .coco_json import load_coco_json
from .grounding import load_mdetr_json, load_odvg_jsonl
from .problems import BadBoxes
from .records import Records

LOADERS: dict[Format, Callable[..., Records]] = {
    "coco": load_coco_json,
    "mdetr": load_mdetr_json,
    "odvg": load_odvg_jsonl,
}


def load_datasets(names: str | Sequence[str]) -> Records | list[Records]:
    """The records of one data set, or a list of them, one entry a data set.

    A name is a registered one or the path of a COCO or MDETR ``.json`` or an ODVG ``.jsonl`` file;
    image file names are then relative to the folder of that file.
    """
    if not isinstance(names, str):
        return [load_datasets(name) for name in names]
    if names in DatasetCatalog:
        return DatasetCatalog.get(names)
    if names.endswith((".json", ".jsonl")):
        return LOADERS[format_of_file(Path(names))](names, Path(names).parent)
    known = ", ".join(name for name in BUILTIN if not name.startswith("odinw_"))
    raise ValueError(
        f"unknown data set {names!r}: use a built-in name ({known}, odinw_<set>_<split>; all: "
        "`python -m dynamic_dino.data list`), a name that you registered, or the path of a COCO "
        "or MDETR .json or an ODVG .jsonl file"
    )


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
    def load() -> Records:
        file, images = entry.locate(root)  # looked for again: it may have come since
        load_file = LOADERS[entry.format_of(file)]
        return load_file(file, images, entry.name, remedy=entry.remedy, **entry.options)

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


register_builtin()
