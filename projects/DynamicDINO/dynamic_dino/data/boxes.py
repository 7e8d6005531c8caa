"""Checking boxes and fitting them into their images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from .fields import read_number
from .problems import DataError, Reporter

Convention = Literal["xywh", "xyxy"]
LAYOUT = {"xywh": "[x, y, width, height]", "xyxy": "[x1, y1, x2, y2]"}
FEW = 0.05  # so small a part of a file's boxes isn't of another convention
FAR = 0.1  # a box that reaches so much of the image's size beyond it was not drawn on it


def read_size(item: dict, name: str) -> tuple[int, int]:
    """(width, height) of an image, which Flickr30k writes as text; raises DataError."""
    size = read_number(item["width"]), read_number(item["height"])
    if not all(side.is_integer() and 0 < side < 1 << 31 for side in size):
        width, height = (str(item[key])[:40] for key in ("width", "height"))
        raise DataError(
            "image without a size",
            f"size {width} x {height} of {name!r}: write the size of the image in pixels",
        )
    return int(size[0]), int(size[1])


def read_box(value: Any, convention: Convention) -> tuple[float, float, float, float]:
    """The four finite numbers of a "bbox"; raises DataError if it isn't that."""
    four = isinstance(value, list | tuple | np.ndarray) and len(value) == 4
    x, y, w, h = map(read_number, value) if four else (math.nan,) * 4
    if not math.isfinite(x + y + w + h):
        raise DataError(
            "malformed box",
            f"bbox {str(value)[:80]} is not four finite numbers: a bbox is {LAYOUT[convention]} "
            "in pixels of the image; correct or remove it",
        )
    return x, y, w, h


def box_around(segmentation: Any) -> tuple[float, float, float, float] | None:
    """XYWH of COCO's polygons, lists [x, y, x, y, ...], or of its run-length mask; None if it is
    neither, or empty. Raises DataError for numbers that aren't any."""
    if isinstance(segmentation, dict) and {"counts", "size"} <= segmentation.keys():
        return _box_of_mask(segmentation)
    if not isinstance(segmentation, list) or not segmentation:
        return None
    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
    try:
        points = np.concatenate([np.asarray(p, dtype=float).reshape(-1, 2) for p in polygons])
    except (TypeError, ValueError):
        points = np.full((1, 2), math.nan)
    if not len(points):
        return None
    x, y, x2, y2 = *points.min(axis=0).tolist(), *points.max(axis=0).tolist()
    if not math.isfinite(x + y + x2 + y2):
        what = f"segmentation {str(segmentation)[:60]} has no bbox beside it, and isn't polygons"
        raise DataError("malformed box", f"{what} of numbers: correct or remove it")
    return x, y, x2 - x, y2 - y


def _box_of_mask(mask: dict) -> tuple[float, float, float, float] | None:
    from faster_coco_eval.core import mask as masks  # a compiled library; few files need it

    try:
        if isinstance(mask["counts"], list):
            mask = masks.frPyObjects(mask, *mask["size"])
        x, y, w, h = np.asarray(masks.toBbox(mask), dtype=float).reshape(4).tolist()
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        what = f"segmentation has no bbox beside it, and isn't a mask ({error}): correct it"
        raise DataError("malformed box", what) from None
    return (x, y, w, h) if w and h else None


def fit_boxes(
    boxes: np.ndarray,
    sizes: np.ndarray,
    convention: Convention,
    report: Reporter,
    where: Callable[[int], str],
) -> tuple[np.ndarray, np.ndarray, int]:
    """Clips boxes to their images.

    Args:
        boxes: float64 [N, 4], in `convention`.
        sizes: [N, 2], (width, height) of each box's image.
        where: the place of box i in its file.

    Returns:
        XYWH float64 [N, 4]; bool [N], which of them are good, after the others were reported; how
        many good ones reached over the border.
    """
    width, height = sizes[:, 0], sizes[:, 1]
    x, y, a, b = boxes.T
    w, h = (a, b) if convention == "xywh" else (a - x, b - y)
    left, top = np.maximum(x, 0), np.maximum(y, 0)
    right, bottom = np.minimum(x + w, width), np.minimum(y + h, height)
    in_image = (x >= 0) & (y >= 0)
    if convention == "xywh":
        leaves = (x + w > width * (1 + FAR)) | (y + h > height * (1 + FAR))
        fits_other = in_image & (a > x) & (b > y) & (a <= width) & (b <= height)
    else:
        leaves = (w < 0) | (h < 0)
        fits_other = in_image & (a > 0) & (b > 0) & (x + a <= width) & (y + b <= height)
    mixed = leaves & fits_other
    empty = ((w <= 0) | (h <= 0)) & ~mixed
    outside = ((right <= left) | (bottom <= top)) & ~mixed & ~empty
    good = ~(mixed | empty | outside)
    # By chance a box that reaches beyond the image fits it in the other convention too. That is so
    # where others reach as far and don't fit, or where almost no box can be of the other.
    reach = int((good & leaves).sum())
    clear = int((good & ~fits_other).sum())
    beyond = convention == "xywh" and mixed.sum() <= max(reach, clear * FEW)
    for i in np.flatnonzero(~good):
        if mixed[i] and beyond:
            kind = "box beyond the image"
            fault = f"reaches far beyond the image, to ({x[i] + w[i]:g}, {y[i] + h[i]:g}),"
        elif mixed[i]:
            kind, fault = "mixed box conventions", _mixed(convention)
        elif empty[i]:
            kind, fault = "empty box", "is without a positive width and height"
        else:
            kind, fault = "box outside the image", "is outside the image"
        numbers = ", ".join(f"{v:g}" for v in boxes[i])
        report(
            DataError(
                kind,
                f"bbox [{numbers}] {fault} (of {width[i]} x {height[i]}): a bbox is "
                f"{LAYOUT[convention]} in pixels of the image; correct or remove it",
                where(int(i)),
            )
        )
    over = good & ((left > x) | (top > y) | (right < x + w) | (bottom < y + h))
    # the numbers of the file where nothing is clipped, free of the rounding of x + w - x
    w, h = np.where(over, right - left, w), np.where(over, bottom - top, h)
    return np.stack([left, top, w, h], axis=1), good, int(over.sum())


def _mixed(convention: Convention) -> str:
    if convention == "xywh":
        return f"reaches far beyond the image, but fits the image as {LAYOUT['xyxy']}"
    return f"is without a positive width and height, but fits the image as {LAYOUT['xywh']}"


def corners(boxes: np.ndarray) -> np.ndarray:
    """x, y, width, height -> x0, y0, x1, y1, float64 [N, 4]"""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
