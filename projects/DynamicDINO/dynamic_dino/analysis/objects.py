"""The objects of a data set, how hard each is, and the query that stands for it."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from ..data.boxes import corners
from ..data.fields import id_array
from ..modeling.losses.boxes import box_iou
from .collect import Collection

SMALL = 32**2  # COCO's
COVERED = 0.3  # of an object's box inside the box of another: it is occluded


@dataclass
class Objects:
    """M objects of a collection, crowds left out.

    annotations   their entries in `truth`
    category_ids  [M], see `data.fields.id_array`
    small         bool [M], area below 32^2 pixels of the original image (COCO's APs)
    occluded      bool [M], by the annotation's own "occluded"; where it has none, at least 30 % of
                  its box lies in the box of one other object
    tail          bool [M], of a rare class, see `tail_classes`
    owner         int64 [M], the detection of its image whose box fits best (highest IoU; the first
                  of equal ones), whatever its class and score; -1 where none overlaps
    iou           float [M], of the owner's box
    """

    annotations: list[dict]
    category_ids: np.ndarray
    small: np.ndarray
    occluded: np.ndarray
    tail: np.ndarray
    owner: np.ndarray
    iou: np.ndarray

    def __len__(self) -> int:
        return len(self.annotations)


def objects_of(collection: Collection) -> Objects:
    annotations = [a for a in collection.truth["annotations"] if not a["iscrowd"]]
    rare = tail_classes(collection.truth)
    areas = np.array([a["area"] for a in annotations])
    return Objects(
        annotations,
        id_array([a["category_id"] for a in annotations]),
        areas < SMALL,
        occluded(annotations),
        np.array([a["category_id"] in rare for a in annotations], bool),
        *owners(collection, annotations),
    )


def tail_classes(truth: dict) -> set[int]:
    """The classes of frequency "r"; where the data set doesn't grade its classes, the third of
    those with objects that has the fewest."""
    graded = {c["id"] for c in truth["categories"] if c.get("frequency") == "r"}
    if graded or any(c.get("frequency") for c in truth["categories"]):
        return graded
    counts = Counter(a["category_id"] for a in truth["annotations"] if not a["iscrowd"])
    ranked = sorted(counts, key=lambda category: (counts[category], category))
    return set(ranked[: len(ranked) // 3])


def occluded(annotations: list[dict]) -> np.ndarray:
    result = np.zeros(len(annotations), bool)
    for rows in _by_image(annotations).values():
        x0, y0, x1, y1 = corners(np.array([annotations[i]["bbox"] for i in rows])).T
        width = np.minimum(x1[:, None], x1) - np.maximum(x0[:, None], x0)
        height = np.minimum(y1[:, None], y1) - np.maximum(y0[:, None], y0)
        common = width.clip(0) * height.clip(0)
        np.fill_diagonal(common, 0)
        area = ((x1 - x0) * (y1 - y0)).clip(1e-9)
        result[rows] = (common / area[:, None]).max(1) >= COVERED
    flags = [a.get("occluded") for a in annotations]
    return np.array([r if f is None else f for r, f in zip(result, flags, strict=True)], bool)


def owners(collection: Collection, annotations: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Index of the detection that fits each object best, -1 where none overlaps; and its IoU."""
    owner, iou = np.full(len(annotations), -1), np.zeros(len(annotations))
    spans = image_spans(collection)
    for image_id, rows in _by_image(annotations).items():
        first, last = spans.get(image_id, (0, 0))
        if first == last:
            continue
        boxes = np.array([annotations[i]["bbox"] for i in rows])
        found = corners(collection.predictions.boxes[first:last])
        boxes, found = torch.from_numpy(corners(boxes)), torch.from_numpy(found)
        overlap = box_iou(boxes[:, None], found).numpy()
        best = overlap.argmax(1)
        iou[rows] = overlap.max(1)
        owner[rows] = np.where(iou[rows] > 0, first + best, -1)
    return owner, iou


def image_spans(collection: Collection) -> dict[int | str, tuple[int, int]]:
    """image id -> (first, last + 1) of its detections"""
    ids = collection.predictions.image_ids
    if not len(ids):
        return {}
    starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    ends = np.r_[starts[1:], len(ids)]
    spans = zip(starts.tolist(), ends.tolist(), strict=True)
    return dict(zip(ids[starts].tolist(), spans, strict=True))


def _by_image(annotations: list[dict]) -> dict[int | str, list[int]]:
    rows = defaultdict(list)
    for i, annotation in enumerate(annotations):
        rows[annotation["image_id"]].append(i)
    return rows
