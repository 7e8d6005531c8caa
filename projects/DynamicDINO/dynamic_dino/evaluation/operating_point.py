"""What a user sees at one threshold: how many of the boxes are right, how many objects have one.

AP ranks the boxes of each class apart, and heeds no threshold; here all classes count together, by
the number of their boxes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .coco import ids_of, read_ground_truth
from .matching import match
from .predictions import DatasetPredictions


@dataclass(frozen=True)
class OperatingPoint:
    """Boxes with a score of `threshold` or more.

    precision       percentage of the boxes that are right; 0 if there are none
    recall          percentage of the objects that have a right box; 0 if there are none
    f1              harmonic mean of the two
    boxes           right and wrong ones; those that only find a crowd are neither
    per_image       boxes an image
    images          percentage of the images that have a box
    """

    threshold: float
    precision: float
    recall: float
    f1: float
    boxes: int
    per_image: float
    images: float


def operating_points(
    ground_truth: str | Path | dict,
    predictions: str | Path | Iterable[dict] | DatasetPredictions,
    thresholds: Sequence[float],
    *,
    iou: float = 0.5,
) -> tuple[list[OperatingPoint], OperatingPoint | None]:
    """Precision and recall over all images and classes at each threshold, and the point of the best
    F1, of equal ones that of the highest threshold; None if there are no boxes.

    Boxes find objects as in COCO, at the IoU `iou` (`match`), so what a box finds doesn't depend on
    the threshold.

    Raises FileNotFoundError or ValueError as `coco_ap` does.
    """
    if not all(np.isfinite(thresholds)):
        raise ValueError(f"thresholds {list(thresholds)} must be finite numbers")
    truth = read_ground_truth(ground_truth)
    predictions = DatasetPredictions.read(predictions)
    predictions.check_ids(*ids_of(truth))
    right, counts = (flags[0] for flags in match(truth, predictions, [iou]))
    order = np.argsort(-predictions.scores, kind="stable")
    order = order[counts[order]]
    scores = predictions.scores[order]
    hits = np.concatenate([[0], np.cumsum(right[order])])
    _, image = np.unique(predictions.image_ids[order], return_inverse=True)
    new_image = np.zeros(len(order), dtype=bool)
    new_image[np.unique(image, return_index=True)[1]] = True
    seen = np.concatenate([[0], np.cumsum(new_image)])
    objects = sum(not a["iscrowd"] for a in truth["annotations"])
    num_images = max(len(truth["images"]), 1)

    def point(threshold: float) -> OperatingPoint:
        n = int(np.searchsorted(-scores, -threshold, side="right"))
        hit = int(hits[n])
        return OperatingPoint(
            threshold=float(threshold),
            precision=100 * hit / max(n, 1),
            recall=100 * hit / max(objects, 1),
            f1=100 * 2 * hit / max(n + objects, 1),
            boxes=n,
            per_image=n / num_images,
            images=100 * int(seen[n]) / num_images,
        )

    # A threshold is a score; at equal ones, all of them are in.
    ends = np.flatnonzero(np.r_[scores[1:] != scores[:-1], True]) if len(scores) else []
    f1 = [2 * hits[n + 1] / (n + 1 + objects) for n in ends]
    best = point(scores[ends[int(np.argmax(f1))]]) if f1 else None
    return [point(threshold) for threshold in thresholds], best


def best_point(points: Iterable[OperatingPoint]) -> OperatingPoint | None:
    """The point of the best F1, of equal ones that of the highest threshold; None without boxes."""
    found = [point for point in points if point.boxes]
    return max(found, key=lambda point: (point.f1, point.threshold), default=None)
