"""Which boxes find an object: COCO's matching, of all images and classes, at several IoUs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from .predictions import DatasetPredictions
from .refexp import iou_xywh


def match(
    truth: dict, predictions: DatasetPredictions, ious: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """bool [T, N], [T, N]: for each IoU the predictions that find an object; those that count, that
    is all but boxes that find none and lie in a crowd of their class.

    Of an image and class, the better score chooses first, the free object of the largest IoU, at
    least that asked for. So what a box finds depends on no box of a lower score.

    truth  what `read_ground_truth` returns
    """
    objects, crowds = defaultdict(list), defaultdict(list)
    for annotation in truth["annotations"]:
        group = crowds if annotation["iscrowd"] else objects
        group[annotation["image_id"], annotation["category_id"]].append(annotation["bbox"])
    rows = defaultdict(list)
    ids = zip(predictions.image_ids.tolist(), predictions.category_ids.tolist(), strict=True)
    for row, key in enumerate(ids):
        rows[key].append(row)

    least = np.asarray(ious, dtype=float)
    each = np.arange(len(least))
    right = np.zeros((len(least), len(predictions)), dtype=bool)
    counts = np.ones_like(right)
    for key in rows.keys() & (objects.keys() | crowds.keys()):
        members = np.array(rows[key])
        members = members[np.argsort(-predictions.scores[members], kind="stable")]
        boxes = predictions.boxes[members]
        targets = np.array(objects.get(key, ())).reshape(-1, 4)
        overlaps = np.array([iou_xywh(boxes, target) for target in targets])  # [objects, boxes]
        free = np.ones((len(least), len(targets)), dtype=bool)
        # The others overlap nothing enough at any of the IoUs.
        near = overlaps.max(0) >= least.min() if len(targets) else np.zeros(len(boxes), bool)
        for i in np.flatnonzero(near):
            best = np.where(free, overlaps[:, i], -1.0).argmax(1)
            hit = free[each, best] & (overlaps[best, i] >= least)
            right[:, members[i]] = hit
            free[each, best] &= ~hit
        share = [_share_inside(boxes, np.array(crowd)) for crowd in crowds.get(key, ())]
        if share:
            inside = np.max(share, axis=0) >= least[:, None]
            counts[:, members] = right[:, members] | ~inside
    return right, counts


def _share_inside(boxes: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """How much of each box [N, 4] lies in a crowd's, [4]: float [N]."""
    low = np.maximum(boxes[:, :2], crowd[:2])
    high = np.minimum(boxes[:, :2] + boxes[:, 2:], crowd[:2] + crowd[2:])
    return (high - low).clip(0).prod(1) / np.maximum(boxes[:, 2:].prod(1), 1e-12)
