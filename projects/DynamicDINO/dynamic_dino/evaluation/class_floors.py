"""The score, by class, below which a detection is not among the best of its class any more.

Fixed AP counts the 10,000 best detections of each class. As soon as so many better ones are there,
one can be forgotten, and need not be written down either: of LVIS's val, with 153,000 detections a
class, about a third is left. Detections with the score of a floor stay: which of equal ones counts
is decided by their images, at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from detectron2.utils import comm

from ..data.fields import Id, id_array
from ..files import written_whole
from .predictions import DatasetPredictions


class ClassFloors:
    """What of new detections can be among the `most` best of its class, over all images.

    A process that has seen `most` better ones itself knows. With others it knows sooner: each tells
    them, in a file, the score of its `most`-th best, which is a floor for all, and of its
    (`most` / processes)-th best: the lowest of these is reached by `most` detections together.

    Args:
        category_ids: of all classes.
        most: detections of a class that count.
        folder: where the processes tell each other, the same for all; made where needed. None:
            each goes by what it has seen itself.
    """

    def __init__(self, category_ids: Iterable[Id], most: int, folder: Path | None = None) -> None:
        self._ids = np.unique(id_array(category_ids))
        self._most, self._folder = most, folder
        self._floors = np.full(len(self._ids), -np.inf)

    def reached(self, predictions: DatasetPredictions) -> np.ndarray:
        """bool [N], the detections that can count."""
        if not len(predictions):
            return np.ones(0, bool)
        return predictions.scores >= self._floors[self._classes(predictions)]

    def raise_by(self, kept: DatasetPredictions) -> None:
        """The floors become what they can be now that this process has `kept`: the best that it
        has seen, at least `most` of each class where there are so many."""
        world = comm.get_world_size()
        own = self._nth_best(kept, self._most, -(-self._most // world))
        floors = [self._floors, own[0]]
        if self._folder is not None and world > 1:
            floors += self._tell(own, self._folder)
        self._floors = np.maximum.reduce(floors)

    def _tell(self, own: np.ndarray, folder: Path) -> list[np.ndarray]:
        """The floors that follow from what all processes told; [] until all have."""
        paths = [folder / f"{rank:05d}.npy" for rank in range(comm.get_world_size())]
        try:
            with written_whole(paths[comm.get_rank()], binary=True) as file:
                np.save(file, own)
            whole, part = np.stack([np.load(path) for path in paths], 1)
        except (OSError, ValueError, EOFError):  # it saves room, and can wait
            return []
        return [whole.max(0), part.min(0)]

    def _nth_best(self, found: DatasetPredictions, *ns: int) -> np.ndarray:
        """[len(ns), C]: the score of each class's n-th best, -inf where there are fewer."""
        classes = self._classes(found)
        sizes = np.bincount(classes, minlength=len(self._ids))
        starts = np.cumsum(sizes) - sizes
        order = np.lexsort((-found.scores, classes))
        scores = np.full((len(ns), len(sizes)), -np.inf)
        for row, n in zip(scores, ns, strict=True):
            full = sizes >= max(n, 1)
            row[full] = found.scores[order[starts[full] + n - 1]]
        return scores

    def _classes(self, predictions: DatasetPredictions) -> np.ndarray:
        """[N], the place of each one's class in `_ids`."""
        return np.searchsorted(self._ids, predictions.category_ids)
