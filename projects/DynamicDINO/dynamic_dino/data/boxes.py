"""Checking boxes and fitting them into their images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from .problems import DataError, Reporter

Convention = Literal["xywh", "xyxy"]
LAYOUT = {"xywh": "[x, y, width, height]", "xyxy": "[x1, y1, x2, y2]"}
FAR = 0.1  # a box that reaches so much of the image's size beyond it was not drawn on it


def read_size(item: dict, name: str) -> tuple[int, int]:
    """(width, height) of an image, which Flickr30k writes as text; raises DataError."""
    try:
        size = int(item["width"]), int(item["height"])
    except (OverflowError, TypeError, ValueError):
        size = (0, 0)
    if min(size) <= 0:
        raise DataError(
            "image without a size",
            f"size {item['width']} x {item['height']} of {name!r}: write the size of the image in "
            "pixels",
        )
    return size


def read_box(value: Any, convention: Convention) -> tuple[float, float, float, float]:
    """The four finite numbers of a "bbox"; raises DataError if it isn't that."""
    try:
        x, y, w, h = map(float, value)
    except (TypeError, ValueError):
        x = y = w = h = math.nan
    if not math.isfinite(x + y + w + h):
        raise DataError(
            "malformed box",
            f"bbox {value} is not four finite numbers: a bbox is {LAYOUT[convention]} in pixels "
            "of the image; correct or remove it",
        )
    return x, y, w, h


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
    for i in np.flatnonzero(~good):
        kind, fault = (
            ("mixed box conventions", _mixed(convention))
            if mixed[i]
            else ("empty box", "without a positive width and height")
            if empty[i]
            else ("box outside the image", "outside the image")
        )
        numbers = ", ".join(f"{v:g}" for v in boxes[i])
        report(
            DataError(
                kind,
                f"bbox [{numbers}] is {fault} (of {width[i]} x {height[i]}): a bbox is "
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
        return f"far over the border, but fits the image as {LAYOUT['xyxy']}"
    return f"without a positive width and height, but fits the image as {LAYOUT['xywh']}"
