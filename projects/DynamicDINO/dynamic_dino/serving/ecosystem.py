"""Detections as other libraries have them: `supervision.Detections`, entries of COCO results."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING

import torch
from detectron2.structures import Boxes, Instances

from ..modeling.phrases import Phrases

if TYPE_CHECKING:
    import supervision

CLASS_NAME = "class_name"  # supervision's CLASS_NAME_DATA_FIELD
REMEDY = "supervision isn't installed: pip install 'dynamic-dino[supervision]'"


def to_supervision(detections: Instances) -> supervision.Detections:
    """What a `Detector` found, as supervision's annotators, trackers and metrics take it.

    Returns:
        xyxy float32 [N, 4], confidence [N], class_id [N] (the index of the phrase), the phrases in
        ``data["class_name"]``, and tracker_id where there are ``track_ids``; -1 is none.

    Raises ImportError where supervision isn't installed.
    """
    try:
        import supervision as sv
    except ImportError:
        raise ImportError(REMEDY) from None
    import numpy as np

    ids = detections.get("track_ids").cpu().numpy() if detections.has("track_ids") else None
    return sv.Detections(
        xyxy=detections.pred_boxes.tensor.cpu().numpy().astype(np.float32).reshape(-1, 4),
        confidence=detections.scores.cpu().numpy().astype(np.float32),
        class_id=detections.pred_classes.cpu().numpy(),
        tracker_id=None if ids is None else np.where(ids > 0, ids, -1),
        data={CLASS_NAME: np.array(list(detections.phrases), dtype=str)},
    )


def from_supervision(detections: supervision.Detections, image_size: tuple[int, int]) -> Instances:
    """The way back: `Instances` as a `Detector` gives them, in the order that they have.

    Args:
        detections: boxes with ``data["class_name"]``; without scores they have 1, without class
            numbers those in which their names come up. Masks and other data are left behind.
        image_size: (height, width), which supervision doesn't know.

    Raises ValueError for boxes without names.
    """
    names = detections.data.get(CLASS_NAME)
    if names is None:
        if len(detections):
            raise ValueError(
                'the detections have no names: set detections.data["class_name"] to the name of '
                "each box"
            )
        names = ()
    phrases = Phrases(str(name) for name in names)
    numbers = {name: i for i, name in enumerate(dict.fromkeys(phrases))}
    classes, scores = detections.class_id, detections.confidence
    found = Instances(image_size)
    found.pred_boxes = Boxes(torch.tensor(detections.xyxy, dtype=torch.float32).reshape(-1, 4))
    found.scores = (
        torch.ones(len(phrases)) if scores is None else torch.tensor(scores, dtype=torch.float32)
    )
    found.pred_classes = torch.tensor(
        [numbers[name] for name in phrases] if classes is None else classes, dtype=torch.int64
    )
    found.phrases = phrases
    if detections.tracker_id is not None:
        found.track_ids = torch.tensor(detections.tracker_id, dtype=torch.int64).clamp(min=0)
    return found


def to_coco_results(
    detections: Instances, image_id: Hashable, category_ids: Mapping[str, Hashable]
) -> list[dict]:
    """Entries of a COCO results file, of one image: image_id, category_id, bbox (x, y, width,
    height in pixels), score.

    Args:
        category_ids: name -> id, of the data set that the image belongs to; others are left out.
    """
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[phrase],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": score,
        }
        for phrase, score, (x0, y0, x1, y1) in zip(
            detections.phrases,
            detections.scores.tolist(),
            detections.pred_boxes.tensor.tolist(),
            strict=True,
        )
        if phrase in category_ids
    ]
