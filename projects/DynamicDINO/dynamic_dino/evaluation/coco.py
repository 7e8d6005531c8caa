"""COCO average precision of saved predictions, over all classes and over groups of them.

The protocol is COCO's (Lin et al., ECCV 2014; pycocotools): IoU 0.50:0.05:0.95, 101 recall points,
the `max_dets` best detections per image *and class*, crowd regions ignored, the mean over classes
that have ground truth.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..data.coco_json import (
    CocoFile,
    check_categories,
    group_names,
    read_category,
    read_federated,
)
from ..data.fields import read_flag, read_number
from ..data.problems import refuse
from .precision_recall import ClassCurves, DetectionResult, class_curves
from .predictions import DatasetPredictions

FREQUENCIES = ("r", "c", "f")  # LVIS: rare, common, frequent


def coco_ap(
    ground_truth: str | Path | dict,
    predictions: str | Path | Iterable[dict] | DatasetPredictions,
    *,
    max_dets: int = 100,
    groups: Mapping[str, Collection[int]] | None = None,
    image_ids: Collection[int] | None = None,
) -> DetectionResult:
    """COCO AP of boxes.

    Args:
        ground_truth: a COCO detection file, or its content. A missing "area" is the box's, a
            missing "iscrowd" is 0.
        predictions: a COCO results file, or its content: dicts with image_id, category_id,
            bbox [x, y, w, h] in pixels of the original image, and score.
        max_dets: detections kept per image and class; COCO takes 100.
        groups: suffix of the metric -> category ids, e.g. {"r": [4, 8]} adds "APr" and "AP50r".
            Default: what the categories' own "frequency" ("r", "c", "f") and "novel" (bool) say.
        image_ids: evaluate on these images only. Default: all.

    Returns the metrics AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR<max_dets>, ARs, ARm, ARl, and
    AP<group>, AP50<group> for every group of classes.

    Raises:
        FileNotFoundError, ValueError: naming the file, the field and the remedy.
    """
    truth = read_ground_truth(ground_truth)
    predictions = DatasetPredictions.read(predictions)
    curves = coco_curves(truth, predictions, max_dets=max_dets, image_ids=image_ids)
    return curves.result(groups_of(truth) if groups is None else groups)


def coco_curves(
    truth: dict,
    predictions: DatasetPredictions,
    *,
    max_dets: int = 100,
    image_ids: Collection[int] | None = None,
) -> ClassCurves:
    """What `coco_ap` is the mean of, of the truth's classes: all, or some with the predictions of
    them."""
    if max_dets < 1:
        raise ValueError(f"max_dets is {max_dets}, it must be at least 1 (COCO: 100)")
    predictions.check_ids(*ids_of(truth))
    counts = {f"AR{n}": n for n in (1, 10, max_dets) if n <= max_dets}
    return class_curves(truth, predictions, max_dets=counts, image_ids=image_ids)


def groups_of(truth: dict) -> dict[str, list[int]]:
    """`class_groups` by what the categories themselves say."""
    return class_groups(
        [c["id"] for c in truth["categories"]],
        frequency=[c.get("frequency") for c in truth["categories"]],
        novel=[c.get("novel") for c in truth["categories"]],
    )


def ids_of(truth: dict) -> tuple[list, list[int]]:
    """The ids of the images and of the categories."""
    return [i["id"] for i in truth["images"]], [c["id"] for c in truth["categories"]]


def class_groups(
    category_ids: Sequence[int],
    frequency: Sequence[str | None] | None = None,
    novel: Sequence[bool | None] | None = None,
) -> dict[str, list[int]]:
    """Metric suffix -> category ids: "r", "c", "f" by frequency; "_seen", "_novel" by novelty.

    The sequences are parallel; a class whose entry is None belongs to no group of that kind.
    """
    groups: dict[str, list[int]] = {}
    if frequency is not None and any(frequency):
        unknown = {f for f in frequency if f is not None} - set(FREQUENCIES)
        if unknown:
            raise ValueError(
                f"class frequencies must be 'r', 'c' or 'f' (rare, common, frequent): {unknown}"
            )
        for letter in FREQUENCIES:
            groups[letter] = [
                i for i, f in zip(category_ids, frequency, strict=True) if f == letter
            ]
    if novel is not None and any(n is not None for n in novel):
        for suffix, wanted in (("_seen", False), ("_novel", True)):
            groups[suffix] = [
                i
                for i, n in zip(category_ids, novel, strict=True)
                if n is not None and bool(n) == wanted
            ]
    return groups


def read_ground_truth(source: str | Path | dict) -> dict:
    """The parts of a COCO file that the evaluation reads, with defaults filled in. `CocoFile` reads
    it, as for training; boxes stay as they are, also beyond their image.

    The source is not modified.
    """
    if not isinstance(source, dict):
        source = Path(source)
        if not source.is_file():
            raise FileNotFoundError(f"ground truth file {source} does not exist: check its path")
    file = CocoFile(
        source, "", refuse, _read_image, read_category, sized=False, read_further=_read_further
    )
    categories = check_categories(file.path, file.categories, refuse, named=False)
    groups = group_names(categories, file.keys)
    known = {category["id"] for category in categories}
    columns, keys = file.columns, file.keys
    file.leave_out(
        np.array([key not in known for key in keys] + [False])[columns.key],
        "unknown category",
        lambda i: f"category_id {keys[columns.key[i]]!r} is not among the file's categories",
    )
    annotations = [
        {
            "image_id": columns.ids[image],
            "category_id": keys[key],
            "bbox": box,
            "iscrowd": int(crowd),
            **further,
        }
        for image, key, box, crowd, further in zip(
            columns.image.tolist(),
            columns.key.tolist(),
            columns.box.tolist(),
            columns.crowd.tolist(),
            file.further,
            strict=True,
        )
    ]
    images = [
        {**image, "id": image_id}
        for image, image_id in zip(columns.extra, columns.ids, strict=True)
    ]
    categories = [{"name": str(c["id"]), **c} for c in categories if c not in groups]
    return {"images": images, "annotations": annotations, "categories": categories}


def _read_image(image: dict) -> tuple[str, dict]:
    return "", {**image, **read_federated(image)}


def _read_further(annotation: dict, area_of_box: float) -> dict:
    area, occluded = read_number(annotation.get("area")), annotation.get("occluded")
    further = {
        "area": area if math.isfinite(area) else area_of_box,
        "ignore": int(read_flag(annotation.get("ignore"), "ignore")),
    }
    if isinstance(occluded, int | float):  # KITTI counts from 0 to 3
        further["occluded"] = bool(occluded)
    return further
