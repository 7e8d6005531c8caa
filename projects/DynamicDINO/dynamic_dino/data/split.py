"""Splitting a data set by seed, so that both parts have every name in the same share."""

from __future__ import annotations

import numpy as np

from .records import Records

VAL = 0.2


def split_rows(records: Records, val: float = VAL, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training images and of those for validation, int64, each in the file's order.

    Stratified for images with several names (Sechidis et al. 2011): name by name, the rarest first,
    its images go where more of that name are still wanted. So many rare names would leave val too
    small: it is then filled up with images whose names are all in train too. A name of one image is
    trained.

    Raises ValueError for a share that isn't between 0 and 1, fewer than two images, or captions.
    """
    if not 0 < val < 1:
        raise ValueError(f"{val:g} is no share of the images for validation: say one such as 0.2")
    if len(records) < 2:
        raise ValueError(f"{records.dataset_name} has {len(records)} images: a split needs two")
    if records.extra is not None and any("caption" in record for record in records[:1]):
        raise ValueError(
            f"{records.dataset_name} has captions: only data sets with classes can be split"
        )
    rng = np.random.default_rng(seed)
    names_of = [
        np.unique(records.classes[a:b]).tolist()
        for a, b in zip(records.first[:-1], records.first[1:], strict=True)
    ]
    order = rng.permutation(len(records)).tolist()
    images_of: dict[int, list[int]] = {}
    for row in order:
        for name in names_of[row]:
            images_of.setdefault(name, []).append(row)
    left = {name: len(rows) for name, rows in images_of.items()}
    # how many more are wanted in (train, val): images with a name, and in all
    wanted = {name: [n * (1 - val), n * val] for name, n in left.items()}
    in_all = [len(records) * (1 - val), len(records) * val]
    in_val: dict[int, bool] = {}

    def assign(row: int, name: int | None) -> None:
        of_name = wanted[name] if name is not None else in_all
        chosen = (of_name[1], in_all[1]) > (of_name[0], in_all[0])
        in_val[row] = chosen
        in_all[chosen] -= 1
        for other in names_of[row]:
            wanted[other][chosen] -= 1
            left[other] -= 1

    while rest := {name: count for name, count in left.items() if count}:
        rarest = min(rest, key=lambda name: (rest[name], name))
        for row in images_of[rarest]:
            if row not in in_val:
                assign(row, rarest)
    for row in order:
        if row not in in_val:
            assign(row, None)
    in_train = {name: sum(not in_val[row] for row in rows) for name, rows in images_of.items()}
    missing = round(len(records) * val) - sum(in_val.values())
    for row in order:
        if missing > 0 and not in_val[row] and all(in_train[name] > 1 for name in names_of[row]):
            in_val[row], missing = True, missing - 1
            for name in names_of[row]:
                in_train[name] -= 1
    mask = np.array([in_val[row] for row in range(len(records))])
    if mask.all() or not mask.any():  # too few to share out: one image goes over
        often = max(order, key=lambda row: min([len(images_of[n]) for n in names_of[row]] or [0]))
        mask[often] = not mask[often]
    return np.flatnonzero(~mask), np.flatnonzero(mask)
