"""Non-maximum suppression: of boxes that overlap much, the best is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Instances
from torch import Tensor
from torchvision.ops import batched_nms


def unsuppressed(found: Instances, iou: float, agnostic: bool = False) -> Tensor:
    """Indices of the detections that no better one covers, best first: int64 [K].

    A transformer detector is trained to find an object once, so that none is needed by rule; twins
    come where it is unsure, and of names that mean the same.

    Args:
        iou: a box is dropped if its intersection over union with a better one is more than this.
        agnostic: whatever the phrases of the two are, and not only within a phrase.
    """
    boxes, scores = found.pred_boxes.tensor.float(), found.scores.float()
    return batched_nms(boxes, scores, groups_of(found.phrases, agnostic), iou)


def groups_of(phrases: Sequence[str], agnostic: bool = False) -> Tensor:
    """int64 [K], a number for each phrase; agnostic: one for all."""
    numbers: dict[str, int] = {}
    groups = [0 if agnostic else numbers.setdefault(p, len(numbers)) for p in phrases]
    return torch.tensor(groups, dtype=torch.int64)
