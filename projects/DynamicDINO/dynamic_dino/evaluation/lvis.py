"""LVIS average precision of saved predictions, as its authors define it, and fixed AP.

LVIS (Gupta et al., CVPR 2019) is federated: an image is known to show some classes, known not to
show others ("neg_category_ids"), and nothing is known of the rest. Detections of the rest count
nowhere. Where the objects of a class are not all annotated ("not_exhaustive_category_ids"),
detections that find none of them are no mistakes. There are no crowds.

Two caps on the detections are in use, and their numbers must not be compared:
- LVIS's own: the 300 best of each *image* over all classes. Frequent classes push rare ones out.
- fixed AP (Dave et al., "Evaluating Large-Vocabulary Object Detectors: The Devil is in the
  Details", 2021; MDETR, GLIP, Grounding DINO): the 10,000 best of each *class* over the data set.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np

from .coco import groups_of, ids_of, read_ground_truth
from .precision_recall import ClassCurves, DetectionResult, class_curves
from .predictions import DatasetPredictions

logger = logging.getLogger(__name__)

PER_IMAGE, PER_CLASS = 300, 10_000


def lvis_ap(
    ground_truth: str | Path | dict,
    predictions: str | Path | Iterable[dict] | DatasetPredictions,
    *,
    fixed: bool = False,
    max_dets: int | None = None,
    groups: Mapping[str, Collection[int]] | None = None,
    image_ids: Collection[int] | None = None,
) -> DetectionResult:
    """LVIS AP of boxes; with `fixed`, fixed AP.

    Args:
        ground_truth, predictions, groups, image_ids: as in `coco_ap`. The images of the annotation
            file have neg_category_ids and not_exhaustive_category_ids; objects marked "ignore"
            must not be found.
        max_dets: detections kept, of each image (default 300) or, with `fixed`, of each class over
            the data set (default 10,000).

    Returns the metrics AP, AP50, AP75, APs, APm, APl, AR<max_dets> (fixed AP: AR), ARs, ARm, ARl,
    APr, APc, APf, AP50r, AP50c, AP50f.

    Raises:
        FileNotFoundError, ValueError: naming the file, the field and the remedy.
    """
    max_dets = (PER_CLASS if fixed else PER_IMAGE) if max_dets is None else max_dets
    truth = read_ground_truth(ground_truth)
    predictions = DatasetPredictions.read(predictions)
    whole = warn_of_cut if fixed else best_of_images
    curves = lvis_curves(
        truth, whole(predictions, max_dets), fixed=fixed, max_dets=max_dets, image_ids=image_ids
    )
    return curves.result(groups_of(truth) if groups is None else groups)


def best_of_images(predictions: DatasetPredictions, max_dets: int) -> DatasetPredictions:
    """What counts in LVIS AP, of all classes together."""
    if max_dets < 1:
        raise ValueError(f"max_dets is {max_dets}, it must be at least 1 (LVIS: 300 per image)")
    return predictions.best_per_image(max_dets)


def warn_of_cut(predictions: DatasetPredictions, _: int) -> DatasetPredictions:
    """What counts in fixed AP, of all classes together: everything, which it shouldn't lack."""
    fullest = np.unique(predictions.image_ids, return_counts=True)[1].max(initial=0)
    if fullest == PER_IMAGE:
        logger.warning(
            f"no image has more than {PER_IMAGE} detections, as if they had been cut there: fixed "
            'AP is defined without a cap per image (detector: max_detections_per="chunk")'
        )
    return predictions


def lvis_curves(
    truth: dict,
    predictions: DatasetPredictions,
    *,
    fixed: bool = False,
    max_dets: int,
    image_ids: Collection[int] | None = None,
) -> ClassCurves:
    """What `lvis_ap` is the mean of, of the truth's classes: all, or some with the predictions of
    them. Of each image, the predictions are those that count (`best_of_images`)."""
    if max_dets < 1:
        raise ValueError(f"max_dets is {max_dets}, it must be at least 1 (LVIS: 300 per image)")
    for i, image in enumerate(truth["images"]):
        for field in ("neg_category_ids", "not_exhaustive_category_ids"):
            if field not in image:
                raise ValueError(
                    f"images[{i}] of the ground truth has no {field!r}: it is no LVIS annotation "
                    "file; evaluate it as COCO's"
                )
    predictions.check_ids(*ids_of(truth))
    if fixed:
        predictions = predictions.best_per_class(max_dets)
    judged, unpunished = federated(truth, predictions)
    return class_curves(
        truth,
        predictions[judged],
        max_dets={"AR" if fixed else f"AR{max_dets}": None},
        image_ids=image_ids,
        ignored=("ignore",),
        unpunished=unpunished[judged],
    )


def federated(truth: dict, predictions: DatasetPredictions) -> tuple[np.ndarray, np.ndarray]:
    """bool [N], the detections of classes that are known to be in the image or not; bool [N], those
    of classes of which not all objects are annotated."""
    known = {(a["image_id"], a["category_id"]) for a in truth["annotations"]}
    known |= {(i["id"], c) for i in truth["images"] for c in i["neg_category_ids"]}
    open_ended = {(i["id"], c) for i in truth["images"] for c in i["not_exhaustive_category_ids"]}
    return _are_among(known, predictions), _are_among(open_ended, predictions)


def _are_among(pairs: set[tuple], predictions: DatasetPredictions) -> np.ndarray:
    """bool [N]: whether (image, class) of each detection is one of the pairs."""
    images, image = np.unique(predictions.image_ids, return_inverse=True)
    classes, category = np.unique(predictions.category_ids, return_inverse=True)
    table = np.zeros((len(images), len(classes)), dtype=bool)
    row = {value: i for i, value in enumerate(images.tolist())}
    column = {value: i for i, value in enumerate(classes.tolist())}
    for image_id, category_id in pairs:
        if image_id in row and category_id in column:
            table[row[image_id], column[category_id]] = True
    return table[image, category]
