"""Where data sets lie, and what Detectron2's catalogues know about them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog

from .builtin import Format
from .json_stream import stream_json


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


def format_of_file(path: Path) -> Format:
    """What a file is: ODVG by its ending, MDETR's if its first image has a caption, else COCO."""
    if path.suffix.lower() == ".jsonl":
        return "odvg"
    if path.is_file():
        with contextlib.suppress(ValueError):  # the reader says what is wrong with it
            for _, _, image in stream_json(path, ["images"], progress=False):
                return "mdetr" if isinstance(image, dict) and "caption" in image else "coco"
    return "coco"
