"""`DatasetPredictions`: boxes of a whole data set as arrays, and COCO results files of any size.

A detection takes 40 bytes here and fifteen times as much as a Python dict, which matters where a
thousand names are looked for in tens of thousands of images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..data.fields import Id, id_array, read_id
from ..data.json_stream import stream_json_list
from ..data.problems import DataError
from ..files import written_whole
from .detected_files import is_of_files, of_dataset


@dataclass
class DatasetPredictions:
    """N detections of a data set, in any order.

    image_ids     [N] integers or strings, as the annotation file has them, see `id_array`
    category_ids  [N], the same
    boxes         float [N, 4], (x, y, width, height) in pixels of the original image
    scores        float [N]
    rows          int64 [N] or None: where they stand in what they were taken from, for whoever asks
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows: np.ndarray | slice) -> DatasetPredictions:
        return DatasetPredictions(
            self.image_ids[rows],
            self.category_ids[rows],
            self.boxes[rows],
            self.scores[rows],
            None if self.rows is None else self.rows[rows],
        )

    @classmethod
    def cat(cls, parts: Sequence[DatasetPredictions]) -> DatasetPredictions:
        # Without a detection there is no type of image id either.
        parts = [part for part in parts if len(part)]
        if not parts:
            return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))
        return cls(
            np.concatenate([part.image_ids for part in parts]),
            np.concatenate([part.category_ids for part in parts]),
            np.concatenate([part.boxes for part in parts]),
            np.concatenate([part.scores for part in parts]),
            None if parts[0].rows is None else np.concatenate([part.rows for part in parts]),
        )

    @classmethod
    def read(
        cls, source: str | Path | Iterable[dict] | DatasetPredictions, truth: dict | None = None
    ) -> DatasetPredictions:
        """A COCO results file, or its content: dicts with image_id, category_id, bbox
        [x, y, w, h] and score; given the data set, `truth`, also predict.py's predictions.json,
        see `of_dataset`. Files are read as a stream.

        Raises FileNotFoundError or ValueError naming the file, the entry and the remedy.
        """
        if isinstance(source, DatasetPredictions):
            return source
        if isinstance(source, (str, Path)):
            where, entries = f"predictions file {source}", _entries(Path(source))
        else:
            where, entries = "the predictions", iter(source)
        if truth is not None:
            first = next(entries, None)
            entries = chain(() if first is None else (first,), entries)
            if is_of_files(first):
                entries = of_dataset(entries, truth, where)
        parts, rows = [], []
        for i, entry in enumerate(entries):
            rows.append(_row(entry, f"{where}: entry {i}"))
            if len(rows) == 100_000:
                parts.append(cls._of_rows(rows))
                rows = []
        return cls.cat([*parts, cls._of_rows(rows)])

    @classmethod
    def _of_rows(cls, rows: list[tuple]) -> DatasetPredictions:
        if not rows:
            return cls.cat([])
        numbers = np.array([row[2:] for row in rows])
        return cls(
            id_array(row[0] for row in rows),
            id_array(row[1] for row in rows),
            numbers[:, :4],
            numbers[:, 4],
        )

    def write(self, path: Path) -> None:
        """A COCO results file, one detection a line; whole or not at all."""
        with written_whole(path) as file:
            file.write("[")
            for start in range(0, len(self), 100_000):
                part = self[start : start + 100_000]
                columns = zip(
                    part.image_ids.tolist(),
                    part.category_ids.tolist(),
                    part.boxes.tolist(),
                    part.scores.tolist(),
                    strict=True,
                )
                # nine digits give a float32 back exactly
                lines = [
                    f'{{"image_id": {json.dumps(image)}, "category_id": {json.dumps(category)}, '
                    f'"bbox": [{x:.9g}, {y:.9g}, {w:.9g}, {h:.9g}], "score": {score:.9g}}}'
                    for image, category, (x, y, w, h), score in columns
                ]
                file.write(("," if start else "") + "\n" + ",\n".join(lines))
            file.write("\n]\n")

    def check_ids(self, image_ids: Collection, category_ids: Collection[int]) -> None:
        """Raises ValueError for a detection of an image or a class that there isn't."""
        for field, known in (("image_id", image_ids), ("category_id", category_ids)):
            found = getattr(self, f"{field}s")
            known = set(known)
            for value, entry in _firsts(found):
                if value not in known:
                    raise ValueError(
                        f"the predictions' entry {entry}: {field} {value!r} is not in the ground "
                        "truth: score them with the annotation file of the data set they are of"
                    )

    def best_per_image(self, most: int) -> DatasetPredictions:
        """The `most` best detections of each image over all classes; of equal ones, the first."""
        return self[np.sort(_best(np.unique(self.image_ids, return_inverse=True)[1], self, most))]

    def best_per_class(self, most: int) -> DatasetPredictions:
        """The `most` best detections of each class over all images; of equal ones, the first."""
        classes = np.unique(self.category_ids, return_inverse=True)[1]
        return self[np.sort(_best(classes, self, most))]

    def best_per_image_and_class(self, most: int) -> DatasetPredictions:
        """The `most` best detections of each image and class; of equal ones, the first."""
        images, classes = (
            np.unique(ids, return_inverse=True)[1] for ids in (self.image_ids, self.category_ids)
        )
        groups = images * (classes.max(initial=0) + 1) + classes
        return self[np.sort(_best(groups, self, most))]


def _firsts(ids: np.ndarray) -> Iterator[tuple[Id, int]]:
    """Each id and where it stands first."""
    if ids.dtype == object:  # numbers beside texts have no order
        yield from {value: i for i, value in reversed([*enumerate(ids.tolist())])}.items()
        return
    unique, first = np.unique(ids, return_index=True)
    yield from zip(unique.tolist(), first.tolist(), strict=True)


def _best(groups: np.ndarray, predictions: DatasetPredictions, most: int) -> np.ndarray:
    order = np.lexsort((-predictions.scores, groups))  # stable
    groups = groups[order]
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]]) if len(groups) else groups
    sizes = np.diff(np.r_[starts, len(groups)])
    return order[np.arange(len(groups)) - np.repeat(starts, sizes) < most]


def _entries(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"predictions file {path} does not exist: check its path")
    try:
        yield from stream_json_list(path)
    except ValueError as error:
        raise ValueError(f"{error}; predictions are a list of detections (COCO results)") from None


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError(f"{value} is no number")
    return float(value)


def _row(entry: Any, where: str) -> tuple:
    try:
        image = read_id(entry["image_id"], "image_id")
        category = read_id(entry["category_id"], "category_id")
        x, y, w, h, score = map(_number, (*entry["bbox"], entry["score"]))
    except (DataError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} needs image_id, category_id, bbox [x, y, w, h] and score: {error!r}"
        ) from None
    if not math.isfinite(x + y + w + h + score):
        raise ValueError(f"{where} has a number that is not finite: {entry}")
    return image, category, x, y, w, h, score
