"""A few images of a data set, by seed, that show as many of its names as they can."""

from __future__ import annotations

import numpy as np
from dynamic_dino.data.records import Records


def covering_order(records: Records, seed: int) -> np.ndarray:
    """All rows, int64 [N], of which the first K are the shots of K images.

    As long as a name is missing, the next image is the one that adds most names; of equal ones, and
    from then on, the next of a random order. So the shots of 10 images are among those of 50.
    """
    order = np.random.default_rng(seed).permutation(len(records)).tolist()
    left = {
        row: set(records.classes[records.first[row] : records.first[row + 1]].tolist())
        for row in order
    }
    first: list[int] = []
    while left:
        best = max(left, key=lambda row: len(left[row]))
        if not (new := left.pop(best)):
            left = {best: new, **left}
            break
        first.append(best)
        left = {row: names - new for row, names in left.items()}
    return np.array([*first, *left], dtype=np.int64)
