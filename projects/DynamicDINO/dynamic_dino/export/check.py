"""Whether an exported detector finds what the model finds in PyTorch.

Rounding decides close calls: which of two cells of nearly the same score becomes the earlier query,
and so gets its content, or which of two experts a token takes. A runtime that rounds otherwise then
finds something else there, and is right. How many detections hang on that is measured, of PyTorch
alone: it is run again on pixels that differ by a rounding, and what isn't found twice is a close
call. A trained model has next to none, random weights have some in a hundred.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from scipy.optimize import linear_sum_assignment
from torch import nn

from ..data.images import ImageLike
from ..data.synthetic.drawn import draw_image
from ..modeling.prompt import Prompt
from ..serving.inference import Detector


@dataclass(frozen=True)
class Tolerance:
    """What makes two detections twins, beside their name, and how many may have none.

    scores    greatest difference of their scores
    overlap   least intersection over union of their boxes
    lost      share of the compared detections that may have no twin, beside close calls
    rounding  of the numbers, a part of them, which makes the close calls
    """

    scores: float
    overlap: float
    lost: float
    rounding: float = 2**-22

    def __str__(self) -> str:
        return (
            f"a detection's score may differ by {self.scores:g} and its box must overlap by "
            f"{self.overlap:g}; {self.lost:.0%} may have no such twin, and twice as many as are "
            "close calls"
        )


# Rounding alone; weights of 16 bits; convolutions of 8 bits, of which this finds what is broken: an
# evaluation measures what they cost.
TOLERANCES = {
    "float32": Tolerance(1e-3, 0.95, 0.01),
    "half": Tolerance(0.02, 0.8, 0.05),
    "int8": Tolerance(0.1, 0.5, 0.25),
}


@dataclass
class Difference:
    """What was measured, of one image or of several.

    compared    detections of the reference that are sure enough to be compared
    missing     of these, how many have no twin
    extra       those that are as sure, of the other one, without a twin
    close       of the compared, those that hang on rounding: PyTorch alone doesn't find them again
    scores      greatest difference of twins' scores
    boxes       greatest difference of twins' boxes, as a part of the image's sides
    detections  of the reference, compared or not
    """

    compared: int = 0
    missing: int = 0
    extra: int = 0
    scores: float = 0.0
    boxes: float = 0.0
    detections: int = 0
    images: int = 0
    close: int = 0

    def __add__(self, other: Difference) -> Difference:
        return Difference(
            self.compared + other.compared,
            self.missing + other.missing,
            self.extra + other.extra,
            max(self.scores, other.scores),
            max(self.boxes, other.boxes),
            self.detections + other.detections,
            self.images + other.images,
            self.close + other.close,
        )

    def within(self, allowed: Tolerance) -> bool:
        """Never where nothing was compared: that says nothing of what was written."""
        # One list rounds in one way, the other in another: each may have its own close calls.
        may_be_lost = allowed.lost * self.compared + 2 * self.close
        return self.compared > 0 and max(self.missing, self.extra) <= may_be_lost

    def __str__(self) -> str:
        return (
            f"{self.compared} of {self.detections} detections in {self.images} images: "
            f"{self.missing} have no twin, {self.extra} are new, {self.close} are close calls; "
            f"twins' scores differ by {self.scores:.1e} at most, boxes by {self.boxes:.1e} of "
            "the image's sides"
        )


def compare(
    reference: Detector,
    exported: Detector,
    images: Iterable[ImageLike],
    prompt: Prompt,
    allowed: Tolerance,
) -> Difference:
    """Runs both on images, and the reference once more for its close calls; see `difference`."""

    def found(detector: Detector, image: ImageLike) -> Instances:
        return detector(image, prompt, threshold=0.0, nms=1.0)

    total = Difference()
    for image in images:
        ours = found(reference, image)
        with rounded_otherwise(reference.model, allowed.rounding):
            again = difference(ours, found(reference, image), allowed)
        differs = difference(ours, found(exported, image), allowed)
        total += replace(differs, close=max(again.missing, again.extra))
    return total


@contextmanager
def rounded_otherwise(model: nn.Module, rounding: float) -> Iterator[None]:
    """Meanwhile each normalised pixel is larger by that part of it: of all that is computed of
    pixels, the last bits are others."""
    before = model.pixel_std.clone()
    model.pixel_std /= 1 + rounding
    try:
        yield
    finally:
        model.pixel_std.copy_(before)


def difference(ours: Instances, theirs: Instances, allowed: Tolerance) -> Difference:
    """Of one image. As many detections as possible are paired one to one with their twins, of which
    each gets the nearest. Only those are compared whose twin can't have been cut off: lists end at
    so many detections, and behind what ends one it isn't known what would follow.
    """
    apart = (ours.scores[:, None] - theirs.scores).abs()
    # Half a pixel wider all around, so that a line overlaps with itself.
    wider = torch.tensor([-0.5, -0.5, 0.5, 0.5])
    overlap = pairwise_iou(*(Boxes(found.pred_boxes.tensor + wider) for found in (ours, theirs)))
    twins = (ours.pred_classes[:, None] == theirs.pred_classes) & (apart <= allowed.scores)
    twins &= overlap >= allowed.overlap
    # More pairs are worth more than nearer ones.
    worth = torch.where(twins, overlap - apart + 1 + min(twins.shape), 0.0)
    rows, columns = map(torch.from_numpy, linear_sum_assignment(worth.numpy(), maximize=True))
    paired = twins[rows, columns]
    rows, columns = rows[paired], columns[paired]

    sure, theirs_sure = (
        found.scores > _end(other, len(found)) + allowed.scores
        for found, other in ((ours, theirs), (theirs, ours))
    )
    missing, extra = sure.clone(), theirs_sure
    missing[rows], extra[columns] = False, False
    compared = sure[rows]
    rows, columns = rows[compared], columns[compared]
    sides = torch.tensor([*ours.image_size[::-1]] * 2)
    boxes = (ours.pred_boxes.tensor[rows] - theirs.pred_boxes.tensor[columns]).abs() / sides
    return Difference(
        int(sure.sum()),
        int(missing.sum()),
        int(extra.sum()),
        float(apart[rows, columns].max()) if len(rows) else 0.0,
        float(boxes.max()) if len(rows) else 0.0,
        len(ours),
        1,
    )


def _end(found: Instances, length: int) -> float:
    """The score behind which detections may have been cut off; a list that is shorter than the
    other one wasn't cut off, it lacks some."""
    return float(found.scores.min()) if len(found) >= max(length, 1) else 0.0


def generated_images(side: int, count: int = 3) -> list[np.ndarray]:
    """Drawn shapes, of several aspect ratios, about as large as the canvas."""
    return [np.array(draw_image(np.random.default_rng(i), side)[0]) for i in range(count)]
