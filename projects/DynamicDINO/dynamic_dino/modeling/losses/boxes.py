"""Box formats and overlaps.

The overlaps broadcast over leading dimensions, so one function serves matched pairs ([M, 4] with
[M, 4]) and batches of all pairs ([B, Q, 1, 4] with [B, 1, N, 4]); torchvision's, with which they
agree, do one or the other and know no batches.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """[..., 4] (centre x, centre y, width, height) -> (left, top, right, bottom)."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """[..., 4] (left, top, right, bottom) -> (centre x, centre y, width, height)."""
    low, high = boxes.split(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of xyxy boxes [..., 4], broadcast; 0 if both boxes have no area."""
    intersection, union = _intersection_and_union(a, b)
    return _ratio(intersection, union)


def generalized_box_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU in [-1, 1] of xyxy boxes [..., 4], broadcast (arXiv 1902.09630, algorithm 1)."""
    intersection, union = _intersection_and_union(a, b)
    low = torch.minimum(a[..., :2], b[..., :2])
    high = torch.maximum(a[..., 2:], b[..., 2:])
    hull = (high - low).clamp(min=0).prod(-1)
    return _ratio(intersection, union) - _ratio(hull - union, hull)


def _intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - intersection
    return intersection, union


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return part / whole.clamp(min=torch.finfo(whole.dtype).tiny)
