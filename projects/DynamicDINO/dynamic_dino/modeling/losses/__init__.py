"""From predictions to losses: boxes, matching, the criterion, and denoising queries."""

from .boxes import box_iou, cxcywh_to_xyxy, generalized_box_iou, xyxy_to_cxcywh
from .criterion import Criterion
from .denoising import Denoising
from .matcher import Assignment, HungarianMatcher

__all__ = [
    "Assignment",
    "Criterion",
    "Denoising",
    "HungarianMatcher",
    "box_iou",
    "cxcywh_to_xyxy",
    "generalized_box_iou",
    "xyxy_to_cxcywh",
]
