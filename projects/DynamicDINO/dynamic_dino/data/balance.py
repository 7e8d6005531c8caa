"""Class-balanced sampling: how much more often an image of rare names is drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .records import Record, Records


def repeat_factors(source: Sequence[Record], kept: np.ndarray, threshold: float) -> np.ndarray:
    """float64 [len(kept)], at least 1: the repeat factors of LVIS (Gupta et al., 2019, appendix
    B.2), which Detectron2's `RepeatFactorTrainingSampler` draws by.

    f(c) is the part of the kept images that show class c, r(c) = max(1, sqrt(threshold / f(c))),
    and an image's factor the largest r(c) of its classes. Captions have no classes: all 1.

    kept  int [K], the indices of the records that are drawn from
    """
    factors = np.ones(len(source))
    if len(kept) and "caption" not in source[int(kept[0])]:
        images, classes = _labels(source)
        among = np.zeros(len(source), dtype=bool)
        among[kept] = True
        pairs = np.stack([images, classes])[:, among[images]]
        images, classes = np.unique(pairs, axis=1)  # a class counts once an image
        frequency = np.bincount(classes, minlength=1) / len(kept)
        with np.errstate(divide="ignore"):
            repeats = np.maximum(1, np.sqrt(threshold / frequency))
        np.maximum.at(factors, images, repeats[classes])
    return factors[kept]


def _labels(source: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """int64 [M], [M]: the image and the class of every annotation."""
    if isinstance(source, Records):
        images = np.repeat(np.arange(len(source)), np.diff(source.first))
        return images, source.classes.astype(np.int64)
    pairs = [
        (i, annotation["category_id"])
        for i, record in enumerate(source)
        for annotation in record.get("annotations", ())
    ]
    images, classes = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return images, classes
