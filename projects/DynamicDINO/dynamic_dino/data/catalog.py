"""Where data sets lie, and what Detectron2's catalogues know about them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

from detectron2.data import MetadataCatalog


def dataset_root() -> Path:
    """The folder of the built-in data sets: ``$DETECTRON2_DATASETS``, else ``datasets``."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def require_file(path: Path, remedy: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: {remedy or 'check the path of the data set'} "
            f"(data sets are looked for under DETECTRON2_DATASETS, now {str(dataset_root())!r})"
        )


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
