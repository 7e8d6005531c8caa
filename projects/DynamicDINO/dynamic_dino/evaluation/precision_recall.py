"""Precision and recall of detections by class, the part that the COCO and LVIS protocols share.

faster-coco-eval matches and accumulates, one class at a time: a class needs only its own boxes, so
that no more of a data set's detections than those of one class are Python objects at once, and
processes can share the classes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from .predictions import DatasetPredictions

NOTHING = -1.0  # the value of a metric without ground truth, as in pycocotools


@dataclass
class DetectionResult:
    """What an evaluation found; every number is a percentage, -1 where there is no ground truth.

    metrics    by name; which there are, `coco_ap`, `lvis_ap` and `refexp_precision` say
    per_class  one dict per class of the data set, by category id: id, name, objects, AP, AP50;
               empty where classes mean nothing (referring expressions)
    """

    metrics: dict[str, float]
    per_class: list[dict]


@dataclass
class ClassCurves:
    """Precision and recall of some classes of a data set.

    classes    one dict each, by id: id, name, objects
    precision  [IoU, recall, class, area, max_dets], recall [IoU, class, area, max_dets]; in [0, 1],
               -1 where there is no ground truth
    recalls    names of the recall metrics, along max_dets
    areas      names of the ranges of areas; ious: the thresholds
    """

    classes: list[dict]
    precision: np.ndarray
    recall: np.ndarray
    recalls: list[str]
    areas: list[str]
    ious: np.ndarray

    @classmethod
    def merged(cls, parts: Sequence[ClassCurves]) -> ClassCurves:
        """Of other classes each."""
        classes = [row for part in parts for row in part.classes]
        order = sorted(range(len(classes)), key=lambda k: classes[k]["id"])
        return cls(
            [classes[k] for k in order],
            np.concatenate([part.precision for part in parts], 2)[:, :, order],
            np.concatenate([part.recall for part in parts], 1)[:, order],
            parts[0].recalls,
            parts[0].areas,
            parts[0].ious,
        )

    def result(self, groups: Mapping[str, Collection[int]]) -> DetectionResult:
        """What `average_precision` returns of these classes."""
        precision, recall = self.precision, self.recall
        areas = {label[0]: i for i, label in enumerate(self.areas) if label != "all"}
        iou50, iou75 = (int(np.argmin(abs(self.ious - t))) for t in (0.5, 0.75))
        best = precision[:, :, :, 0, -1]
        metrics = {"AP": _mean(best), "AP50": _mean(best[iou50]), "AP75": _mean(best[iou75])}
        metrics |= {f"AP{size}": _mean(precision[:, :, :, i, -1]) for size, i in areas.items()}
        metrics |= {name: _mean(recall[:, :, 0, i]) for i, name in enumerate(self.recalls)}
        metrics |= {f"AR{size}": _mean(recall[:, :, i, -1]) for size, i in areas.items()}
        column = {row["id"]: k for k, row in enumerate(self.classes)}
        for suffix, members in groups.items():
            columns = sorted(column[category] for category in members)
            metrics[f"AP{suffix}"] = _mean(best[:, :, columns])
            metrics[f"AP50{suffix}"] = _mean(best[iou50][:, columns])
        per_class = [
            row | {"AP": _mean(best[:, :, k]), "AP50": _mean(best[iou50][:, k])}
            for k, row in enumerate(self.classes)
        ]
        return DetectionResult(metrics, per_class)


def average_precision(
    truth: dict,
    predictions: DatasetPredictions,
    *,
    groups: Mapping[str, Collection[int]],
    **options: Any,
) -> DetectionResult:
    """Mean over IoU 0.50:0.95 and classes of the precision at 101 recalls, and of the recall.

    Args:
        groups: suffix of the metrics -> category ids. All others as in `class_curves`.

    Returns AP, AP50, AP75, APs, APm, APl, the recalls, ARs, ARm, ARl, AP<group>, AP50<group>.
    """
    return class_curves(truth, predictions, **options).result(groups)


def class_curves(
    truth: dict,
    predictions: DatasetPredictions,
    *,
    max_dets: Mapping[str, int | None],
    image_ids: Collection | None = None,
    ignored: Collection[str] = ("iscrowd",),
    unpunished: np.ndarray | None = None,
) -> ClassCurves:
    """Precision and recall of each of the truth's classes.

    Args:
        truth: what `read_ground_truth` returns, or its part of some classes.
        max_dets: name of a recall metric -> detections kept per image and class (None: all), in
            ascending order; the last one is that of all other metrics.
        image_ids: evaluate on these images only. Default: all.
        ignored: which objects must not be found but may be: "iscrowd" ones, any number of times
            and by any box inside them, as in COCO; "ignore" ones, like objects, as in LVIS.
        unpunished: bool [N], predictions that are no mistake where they find nothing.
    """
    images = sorted({image["id"] for image in truth["images"]} if image_ids is None else image_ids)
    number = {image: i for i, image in enumerate(images, start=1)}
    objects = defaultdict(list)
    for annotation in truth["annotations"]:
        if annotation["image_id"] in number:
            objects[annotation["category_id"]].append(annotation)

    if unpunished is None:
        unpunished = np.zeros(len(predictions), dtype=bool)
    unique, inverse = np.unique(predictions.image_ids, return_inverse=True)
    numbers = np.array([number.get(image, 0) for image in unique.tolist()], dtype=int)[inverse]
    classes, of_class = np.unique(predictions.category_ids, return_inverse=True)
    by_class = np.argsort(of_class, kind="stable")
    rows_of = dict(
        zip(
            classes.tolist(),
            np.split(by_class, np.cumsum(np.bincount(of_class))[:-1]),
            strict=False,  # without a class there is one part, which is empty
        )
    )

    categories = sorted(truth["categories"], key=lambda category: category["id"])
    precisions, recalls = [], []
    for category in categories:
        rows = rows_of.get(category["id"], by_class[:0])
        rows = rows[numbers[rows] > 0]
        precision, recall, params = _curves(
            objects[category["id"]],
            number,
            predictions[rows],
            numbers[rows],
            unpunished[rows],
            list(max_dets.values()),
            ignored,
        )
        precisions.append(precision)
        recalls.append(recall)
    return ClassCurves(
        [
            {
                "id": category["id"],
                "name": category["name"],
                "objects": sum(not any(a[k] for k in ignored) for a in objects[category["id"]]),
            }
            for category in categories
        ],
        np.stack(precisions, 2),
        np.stack(recalls, 1),
        list(max_dets),
        list(params.areaRngLbl),
        params.iouThrs,
    )


def _curves(
    objects: list[dict],
    number: dict,
    found: DatasetPredictions,
    found_in: np.ndarray,
    unpunished: np.ndarray,
    max_dets: list[int | None],
    ignored: Collection[str],
) -> tuple[np.ndarray, np.ndarray, object]:
    """Of one class: precision [IoU, recall, area, max_dets], recall [IoU, area, max_dets]."""
    annotations = [
        {
            "id": i,  # from 1: the matching takes 0 for "unmatched"
            "image_id": number[a["image_id"]],
            "category_id": 1,
            "bbox": a["bbox"],
            # an area of no range: ignored in each, and otherwise matched like an object
            "area": -1.0 if "ignore" in ignored and a["ignore"] else a["area"],
            "iscrowd": a["iscrowd"] if "iscrowd" in ignored else 0,
        }
        for i, a in enumerate(objects, start=1)
    ]
    columns = (found_in.tolist(), found.boxes.tolist(), found.scores.tolist(), unpunished.tolist())
    detections = [
        {
            "id": i,
            "image_id": image,
            "category_id": 1,
            "bbox": box,
            "area": box[2] * box[3],
            "score": score,
            "lvis_mark": free,  # what COCOeval_faster sets itself with lvis_style
        }
        for i, (image, box, score, free) in enumerate(zip(*columns, strict=True), start=1)
    ]
    images = {a["image_id"] for a in annotations} | set(found_in.tolist())
    content = {"images": [{"id": i} for i in sorted(images)], "categories": [{"id": 1}]}
    evaluator = COCOeval_faster(
        COCO(content | {"annotations": annotations}),
        COCO(content | {"annotations": detections}),
        iouType="bbox",
    )
    params = evaluator.params
    most = int(np.bincount(found_in, minlength=1).max())  # nothing is allocated for more
    params.maxDets = [max(most, 1) if n is None else n for n in max_dets]
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator.eval["precision"][:, :, 0], evaluator.eval["recall"][:, 0], params


def _mean(values: np.ndarray) -> float:
    """Percentage; entries of -1 have no ground truth and don't count."""
    valid = values[values > -1]
    return 100 * float(valid.mean()) if valid.size else NOTHING
