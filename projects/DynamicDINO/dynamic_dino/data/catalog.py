"""Where data sets lie, and what Detectron2's catalogues know about them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Literal

from detectron2.data import MetadataCatalog

Record = dict[str, Any]


def dataset_root() -> Path:
    """The folder of the built-in data sets: ``$DETECTRON2_DATASETS``, else ``datasets``."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def require_file(path: Path, remedy: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: {remedy or 'check the path of the data set'} "
            f"(data sets are looked for under DETECTRON2_DATASETS, now {str(dataset_root())!r})"
        )


def read_json(path: Path, remedy: str, *lists: str) -> dict:
    """The content of a JSON file that must have these lists."""
    require_file(path, remedy)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): the file may be truncated; write or download "
            "it again"
        ) from error
    for field in lists:
        if not isinstance(content, dict) or not isinstance(content.get(field), list):
            raise ValueError(
                f"{path} has no list {field!r}: a COCO detection file has the lists 'images', "
                "'annotations' and 'categories'"
            )
    return content


def require(where: str, item: Any, *fields: str) -> None:
    for field in fields:
        if not isinstance(item, dict) or item.get(field) is None:
            raise ValueError(f"{where} has no {field!r}: add this field")


def replace_metadata(name: str, **fields: Any) -> None:
    """Metadata attributes can't be overwritten, so that a changed file needs a fresh entry."""
    if name in MetadataCatalog:
        MetadataCatalog.remove(name)
    MetadataCatalog.get(name).set(**fields)


def format_of_file(path: Path) -> Literal["coco", "mdetr", "odvg"]:
    """What a file is: ODVG by its ending, MDETR's if its first image has a caption, else COCO."""
    if path.suffix == ".jsonl":
        return "odvg"
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            head = file.read(1 << 16)
        first_image = re.search(r'"images"\s*:\s*\[\s*\{[^{}]*', head)
        if first_image and re.search(r'"caption"\s*:', first_image[0]):
            return "mdetr"
    return "coco"
