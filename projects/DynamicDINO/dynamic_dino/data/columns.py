"""What a reader collects from a file before it becomes `Records`: columns, not dicts."""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .boxes import Convention, fit_boxes
from .fields import fits_int64
from .problems import Reporter
from .records import Records, Texts

logger = logging.getLogger(__name__)

_COLUMNS = {"image": "q", "key": "q", "number": "q", "id": "q", "box": "d", "crowd": "b"}
NO_ID = -(1 << 63)


class Columns:
    """Images: lists `names`, `ids`, `sizes` (width, height), `extra` (further fields of the record
    or None).

    Annotations, appended one by one and, after `close`, arrays [M]: `image`, index of its image;
    `key`, what becomes its class; `number`, its place in the file; `id`, NO_ID if it has none;
    `box` [M, 4]; `crowd`.
    """

    image: np.ndarray
    key: np.ndarray
    number: np.ndarray
    id: np.ndarray
    box: np.ndarray
    crowd: np.ndarray

    def __init__(self) -> None:
        self.names: list[str] = []
        self.ids: list[Any] = []
        self.sizes: list[tuple[int, int]] = []
        self.extra: list[dict | None] = []
        self._open = {name: array(code) for name, code in _COLUMNS.items()}

    def add_image(
        self, name: str, image_id: Any, size: tuple[int, int], extra: dict | None = None
    ) -> int:
        """Returns its index."""
        self.names.append(name)
        self.ids.append(image_id)
        self.sizes.append(size)
        self.extra.append(extra)
        return len(self.names) - 1

    def add_annotation(
        self,
        image: int,
        key: int,
        number: int,
        box: tuple[float, float, float, float],
        crowd: bool = False,
        id: int = NO_ID,
    ) -> None:
        columns = self._open
        columns["image"].append(image)
        columns["key"].append(key)
        columns["number"].append(number)
        columns["id"].append(id)
        columns["box"].extend(box)
        columns["crowd"].append(crowd)

    def close(self) -> None:
        """All annotations are added: their columns become arrays."""
        self._set({name: np.array(column) for name, column in self._open.items()})
        self.box = self.box.reshape(-1, 4)
        del self._open

    def select(self, keep: np.ndarray) -> None:
        """Keeps the annotations where `keep`, bool [M], is True."""
        if not keep.all():
            self._set({name: getattr(self, name)[keep] for name in _COLUMNS})

    def _set(self, columns: dict[str, np.ndarray]) -> None:
        self.image, self.key, self.number = columns["image"], columns["key"], columns["number"]
        self.id, self.box, self.crowd = columns["id"], columns["box"], columns["crowd"]

    def fit(
        self, file: Path, convention: Convention, report: Reporter, where: Callable[[int], str]
    ) -> None:
        """Clips the boxes, XYWH from now on; reports and leaves out those that can't be right."""
        sizes = np.array(self.sizes, dtype=np.int64).reshape(-1, 2)[self.image]
        self.box, good, clipped = fit_boxes(self.box, sizes, convention, report, where)
        self.select(good)
        if clipped:
            logger.warning("%s: clipped %d boxes to their images", file, clipped)

    def records(self, dataset_name: str, image_root: Path, classes: np.ndarray) -> Records:
        """`classes`: int [M], contiguous."""
        order = np.argsort(self.image, kind="stable")
        first = np.searchsorted(self.image[order], np.arange(len(self.names) + 1))
        integers = all(map(fits_int64, self.ids))
        extra = None
        if any(self.extra):
            extra = Texts.of(json.dumps(e or {}, separators=(",", ":")) for e in self.extra)
        return Records(
            dataset_name,
            image_root,
            Texts.of(self.names),
            np.array(self.ids, dtype=np.int64) if integers else self.ids,
            np.array(self.sizes, dtype=np.int32).reshape(-1, 2),
            first,
            self.box[order],
            classes[order],
            self.crowd[order],
            extra,
        )
