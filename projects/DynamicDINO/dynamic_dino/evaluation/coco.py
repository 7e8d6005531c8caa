"""COCO average precision of saved predictions, over all classes and over groups of them.

The protocol is COCO's (Lin et al., ECCV 2014; pycocotools): IoU 0.50:0.05:0.95, 101 recall points,
the `max_dets` best detections per image *and class*, crowd regions ignored, the mean over classes
that have ground truth. faster-coco-eval does the matching.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

NOTHING = -1.0  # the value of a metric without ground truth, as in pycocotools

FREQUENCIES = ("r", "c", "f")  # LVIS: rare, common, frequent


@dataclass
class DetectionResult:
    """What `coco_ap` found; every number is a percentage, -1 where there is no ground truth.

    metrics    AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR<max_dets>, ARs, ARm, ARl, and
               AP<group>, AP50<group> for every group of classes
    per_class  one dict per class of the data set, by category id: id, name, objects, AP, AP50
    """

    metrics: dict[str, float]
    per_class: list[dict]


def coco_ap(
    ground_truth: str | Path | dict,
    predictions: str | Path | Sequence[dict],
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
        max_dets: detections kept per image and class; COCO takes 100, LVIS 300.
        groups: suffix of the metric -> category ids, e.g. {"r": [4, 8]} adds "APr" and "AP50r".
            Default: what the categories' own "frequency" ("r", "c", "f") and "novel" (bool) say.
        image_ids: evaluate on these images only. Default: all.

    Raises:
        FileNotFoundError, ValueError: naming the file, the field and the remedy.
    """
    if max_dets < 1:
        raise ValueError(f"max_dets is {max_dets}, it must be at least 1 (COCO: 100, LVIS: 300)")
    truth = read_ground_truth(ground_truth)
    detections = _read_predictions(predictions, truth)
    if groups is None:
        groups = class_groups(
            [c["id"] for c in truth["categories"]],
            frequency=[c.get("frequency") for c in truth["categories"]],
            novel=[c.get("novel") for c in truth["categories"]],
        )

    evaluator = COCOeval_faster(COCO(truth), COCO(detections), iouType="bbox")
    params = evaluator.params
    params.maxDets = [n for n in (1, 10) if n < max_dets] + [max_dets]
    if image_ids is not None:
        params.imgIds = sorted(set(image_ids))
    evaluator.evaluate()
    evaluator.accumulate()

    # precision [IoU, recall, class, area, max_dets], recall [IoU, class, area, max_dets]
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]
    areas = {label[0]: i for i, label in enumerate(params.areaRngLbl) if label != "all"}
    iou50, iou75 = (int(np.argmin(abs(params.iouThrs - t))) for t in (0.5, 0.75))
    best = precision[:, :, :, 0, -1]

    metrics = {
        "AP": _mean(best),
        "AP50": _mean(best[iou50]),
        "AP75": _mean(best[iou75]),
    }
    metrics |= {f"AP{size}": _mean(precision[:, :, :, i, -1]) for size, i in areas.items()}
    metrics |= {f"AR{n}": _mean(recall[:, :, 0, i]) for i, n in enumerate(params.maxDets)}
    metrics |= {f"AR{size}": _mean(recall[:, :, i, -1]) for size, i in areas.items()}

    column = {category: k for k, category in enumerate(params.catIds)}
    for suffix, members in groups.items():
        columns = sorted(column[category] for category in members)
        metrics[f"AP{suffix}"] = _mean(best[:, :, columns])
        metrics[f"AP50{suffix}"] = _mean(best[iou50][:, columns])

    images = set(params.imgIds)
    objects = Counter(
        a["category_id"]
        for a in truth["annotations"]
        if a["image_id"] in images and not a["iscrowd"]
    )
    per_class = [
        {
            "id": category["id"],
            "name": category["name"],
            "objects": objects[category["id"]],
            "AP": _mean(best[:, :, column[category["id"]]]),
            "AP50": _mean(best[iou50][:, column[category["id"]]]),
        }
        for category in sorted(truth["categories"], key=lambda c: c["id"])
    ]
    return DetectionResult(metrics, per_class)


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
    """The parts of a COCO file that the evaluation reads, with defaults filled in.

    The source is not modified. Annotations are renumbered from 1: the matching takes id 0 for
    "unmatched".
    """
    data, where = _load(source, "ground truth")
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise ValueError(f"{where} has no list '{key}': it must be a COCO detection file")
    annotations = []
    for i, a in enumerate(data["annotations"]):
        try:
            x, y, w, h = (float(v) for v in a["bbox"])
            annotations.append(
                {
                    "id": i + 1,
                    "image_id": a["image_id"],
                    "category_id": a["category_id"],
                    "bbox": [x, y, w, h],
                    "area": float(a.get("area", w * h)),
                    "iscrowd": int(a.get("iscrowd", 0)),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{where}: annotations[{i}] needs image_id, category_id and bbox [x, y, w, h], "
                f"but is {a}: {error!r}"
            ) from None
    categories = [{"name": str(c["id"]), **c} for c in data["categories"]]
    return {"images": data["images"], "annotations": annotations, "categories": categories}


def _read_predictions(source: str | Path | Sequence[dict], truth: dict) -> dict:
    data, where = _load(source, "predictions")
    if not isinstance(data, Sequence):
        raise ValueError(f"{where} must be a list of detections (COCO results format)")
    known = {
        "image_id": {image["id"] for image in truth["images"]},
        "category_id": {category["id"] for category in truth["categories"]},
    }
    annotations = []
    for i, p in enumerate(data):
        try:
            x, y, w, h = (float(v) for v in p["bbox"])
            score = float(p["score"])
            for key, ids in known.items():
                if p[key] not in ids:
                    raise ValueError(f"{key} {p[key]} is not in the ground truth")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{where}: entry {i} needs image_id, category_id, bbox [x, y, w, h] and score of "
                f"the same data set as the ground truth: {error!r}"
            ) from None
        if not math.isfinite(x + y + w + h + score):
            raise ValueError(f"{where}: entry {i} has a number that is not finite: {p}")
        annotations.append(
            {
                "id": i + 1,
                "image_id": p["image_id"],
                "category_id": p["category_id"],
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
                "score": score,
            }
        )
    return {
        "images": truth["images"],
        "annotations": annotations,
        "categories": truth["categories"],
    }


def _load(source, what: str):
    if not isinstance(source, (str, Path)):
        return source, f"the {what}"
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{what} file {path} does not exist")
    try:
        return json.loads(path.read_text()), f"{what} file {path}"
    except ValueError as error:
        raise ValueError(
            f"{what} file {path} is not valid JSON ({error}): it is truncated or damaged, "
            "write or download it again"
        ) from None


def _mean(values: np.ndarray) -> float:
    """Percentage; entries of -1 have no ground truth and don't count."""
    valid = values[values > -1]
    return 100 * float(valid.mean()) if valid.size else NOTHING
