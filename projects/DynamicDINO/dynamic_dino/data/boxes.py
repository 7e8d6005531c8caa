"""What can be wrong with a box."""

from __future__ import annotations

import math
from typing import Any, Literal

BadBoxes = Literal["error", "drop"]

FAULTS = {
    "malformed": "not four finite numbers",
    "empty": "without a positive width and height",
    "outside": "outside the image",
}


def clip_box(box: Any, width: float, height: float) -> tuple[list[float], str | None]:
    """Clips [x, y, w, h] to the image; returns it with what was wrong with it, if anything."""
    try:
        x, y, w, h = (float(v) for v in box)
    except (TypeError, ValueError):
        return [], "malformed"
    if not all(map(math.isfinite, (x, y, w, h))):
        return [], "malformed"
    if w <= 0 or h <= 0:
        return [], "empty"
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
    if right <= left or bottom <= top:
        return [], "outside"
    if (left, top) == (x, y) and right == x + w and bottom == y + h:
        return [x, y, w, h], None
    return [left, top, right - left, bottom - top], "clipped"
