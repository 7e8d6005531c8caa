"""Whether an exported detector finds what the model finds in PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures import Instances
from torch import Tensor

from ..data.images import ImageLike
from ..data.synthetic.drawn import draw_image
from ..modeling.prompt import Prompt
from ..serving.inference import Detector


@dataclass
class Tolerance:
    """scores   greatest difference of scores of the same rank
    boxes       greatest difference of boxes of the same phrase and score, as parts of the image
    lost        share of detections whose score or box isn't found again at all
    """

    scores: float
    boxes: float
    lost: float


# Rounding alone, and the close calls of the query selection that it decides; weights of 16 bits; of
# 8 bits, only that nothing is broken: an evaluation measures what they cost.
TOLERANCES = {
    "float32": Tolerance(1e-3, 5e-3, 0.01),
    "half": Tolerance(0.02, 0.02, 0.05),
    "int8": Tolerance(0.3, 1.0, 1.0),
}


@dataclass
class Difference:
    """What `compare` measured, over all images: see `Tolerance`; detections: how many there are."""

    scores: float = 0.0
    boxes: float = 0.0
    lost: int = 0
    detections: int = 0
    images: int = 0

    def within(self, allowed: Tolerance) -> bool:
        return (
            self.scores <= allowed.scores
            and self.boxes <= allowed.boxes
            and self.lost <= allowed.lost * self.detections
        )

    def __str__(self) -> str:
        return (
            f"{self.detections} detections in {self.images} images: scores differ by "
            f"{self.scores:.1e} at most, boxes by {self.boxes:.1e} of the image's sides; "
            f"{self.lost} detections are not found again"
        )


def compare(
    reference: Detector,
    exported: Detector,
    images: Iterable[ImageLike],
    prompt: Prompt,
    allowed: Tolerance,
) -> Difference:
    """Runs both on images, of all their detections, whatever their scores."""
    total = Difference()
    for image in images:
        ours = reference(image, prompt, threshold=0.0, nms=1.0)
        theirs = exported(image, prompt, threshold=0.0, nms=1.0)
        scores, boxes, lost = difference(ours, theirs, allowed)
        total.scores, total.boxes = max(total.scores, scores), max(total.boxes, boxes)
        total.lost += lost
        total.detections += len(ours)
        total.images += 1
    return total


def difference(ours: Instances, theirs: Instances, allowed: Tolerance) -> tuple[float, float, int]:
    """Of one image: the greatest difference of scores of the same rank; that of boxes, each to the
    nearest of its phrase with about its score; how many have none within twice what is allowed.

    Scores that differ less than is allowed may have changed places; those at the end, which may
    have been cut off there, aren't looked for.
    """
    if len(ours) != len(theirs):
        return float("inf"), 0.0, abs(len(ours) - len(theirs))
    if not len(ours):
        return 0.0, 0.0, 0
    height, width = ours.image_size
    sides = torch.tensor([width, height, width, height])
    scores = float((ours.scores - theirs.scores).abs().max())
    near = (ours.scores[:, None] - theirs.scores).abs() <= allowed.scores
    same = near & (ours.pred_classes[:, None] == theirs.pred_classes)
    apart: Tensor = (
        (ours.pred_boxes.tensor / sides)[:, None] - theirs.pred_boxes.tensor / sides
    ).abs()
    nearest = apart.amax(-1).masked_fill(~same, torch.inf).amin(1)
    nearest = nearest[ours.scores > ours.scores.min() + allowed.scores]
    found = nearest <= 2 * allowed.boxes
    worst = float(nearest[found].max()) if found.any() else 0.0
    return scores, worst, int((~found).sum())


def generated_images(side: int, count: int = 3) -> list[np.ndarray]:
    """Drawn shapes, of several aspect ratios, about as large as the canvas."""
    return [np.array(draw_image(np.random.default_rng(i), side)[0]) for i in range(count)]
