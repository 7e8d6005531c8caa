"""Precision at k of referring expressions (RefCOCO, RefCOCO+, RefCOCOg) of saved predictions.

Every expression is an image of its own in the annotation file (MDETR's format) and refers to one
box. P@k is the share of expressions of which one of the k best boxes overlaps it with an IoU of at
least 0.5. (MDETR's own script asks for a generalised IoU of 0.5, which is a little stricter.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from .coco import ids_of, read_ground_truth
from .precision_recall import NOTHING, DetectionResult
from .predictions import DatasetPredictions

KS = (1, 5, 10)


def refexp_precision(
    ground_truth: str | Path | dict,
    predictions: str | Path | Iterable[dict] | DatasetPredictions,
    *,
    ks: Sequence[int] = KS,
    iou: float = 0.5,
    image_ids: Collection[int] | None = None,
) -> DetectionResult:
    """P@k for each k: metrics "P@1", "P@5", "P@10".

    Args:
        ground_truth: a COCO-style file, or its content, with one annotation per image, that is per
            expression.
        predictions: as in `coco_ap`; the category doesn't matter. Of boxes with equal scores the
            first counts as better. An expression without predictions is missed.
        image_ids: evaluate these expressions only. Default: all.

    Raises:
        FileNotFoundError, ValueError: naming the file, the field and the remedy.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"ks is {list(ks)}, P@k needs at least one k of at least 1")
    truth = read_ground_truth(ground_truth)
    targets: dict = {}
    for annotation in truth["annotations"]:
        if annotation["image_id"] in targets:
            raise ValueError(
                f"expression {annotation['image_id']} of the ground truth has several boxes: P@k "
                "is defined for one box an expression"
            )
        targets[annotation["image_id"]] = annotation["bbox"]
    images, _ = ids_of(truth)
    missing = set(images) - targets.keys()
    if missing:
        raise ValueError(
            f"expression {min(missing)} of the ground truth has no box, and {len(missing) - 1} "
            "others: P@k is defined for one box an expression"
        )
    predictions = DatasetPredictions.read(predictions)
    predictions.check_ids(images, np.unique(predictions.category_ids).tolist())

    wanted = set(images) if image_ids is None else set(image_ids)
    hits = dict.fromkeys(ks, 0)
    best = predictions.best_per_image(max(ks))
    order = np.lexsort((-best.scores, np.unique(best.image_ids, return_inverse=True)[1]))
    best = best[order]
    ids, starts = np.unique(best.image_ids, return_index=True)
    ends = [*starts[1:], len(best)]
    for image, start, end in zip(ids.tolist(), starts, ends[: len(ids)], strict=True):
        if image in wanted:
            overlap = iou_xywh(best.boxes[start:end], np.asarray(targets[image])) >= iou
            for k in ks:
                hits[k] += bool(overlap[:k].any())
    total = len(wanted)
    metrics = {f"P@{k}": 100 * hits[k] / total if total else NOTHING for k in ks}
    return DetectionResult(metrics, [])


def iou_xywh(boxes: np.ndarray, target: np.ndarray) -> np.ndarray:
    """IoU of boxes [N, 4] with one box [4], all (x, y, width, height)."""
    low = np.maximum(boxes[:, :2], target[:2])
    high = np.minimum(boxes[:, :2] + boxes[:, 2:], target[:2] + target[2:])
    intersection = (high - low).clip(0).prod(1)
    union = boxes[:, 2:].prod(1) + target[2:].prod() - intersection
    return intersection / np.maximum(union, 1e-12)
