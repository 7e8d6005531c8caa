"""LabelMe: a JSON file an image, with shapes in pixels.

Rectangles, polygons, circles, masks and other shapes of at least three points give boxes; points
and lines have none: they are left out and counted. A JSON file belongs to its "imagePath", else to
the picture of its own name. Pictures without a JSON file were not annotated: they are left out and
counted.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..fields import read_finite
from ..problems import DataError, require_fields
from .collector import Collector
from .recognise import Recognised
from .text import read_json

NO_AREA = ("point", "points", "line", "linestrip")


def read(found: Recognised, into: Collector) -> None:
    for part, file in found.files:
        try:
            content = _content(file)
            image = _add_image(content, file, into) if into.wants(part) else None
        except DataError as error:
            into.problem(error, str(file))
            continue
        for i, shape in enumerate(content["shapes"]):
            where = f"{file}: shapes[{i}]"
            try:
                require_fields(shape, "label", "points")
                if shape.get("shape_type") in NO_AREA:
                    into.notes["left out {n} points and lines, which have no box"] += 1
                    continue
                into.name(shape["label"])
                points = _outline(shape)
            except DataError as error:
                into.problem(error, where)
                continue
            if image is not None:
                into.hull(image, shape["label"], points, where)
    into.note_images_without("a JSON file")


def _content(file: Path) -> dict[str, Any]:
    content = read_json(file)
    require_fields(content, "shapes")
    if not isinstance(content["shapes"], list):
        raise DataError("missing field", "'shapes' is no list: write one, [] where nothing is seen")
    return content


def _add_image(content: dict, file: Path, into: Collector) -> int:
    named = str(content.get("imagePath") or "")
    path = into.pictures.find([named], file) or into.pictures.of_stem(file)
    size = content.get("imageWidth"), content.get("imageHeight")
    return into.image(path, str(file), None if None in size else size, named or file.stem)


def _outline(shape: dict) -> Any:
    """Points around which the box lies: for a circle, of centre and a point on it, two corners."""
    points = shape["points"]
    try:
        if shape.get("shape_type") == "circle":
            (x, y), (a, b) = ([read_finite(v) for v in point] for point in points)
            radius = math.hypot(a - x, b - y)
            return [(x - radius, y - radius), (x + radius, y + radius)]
        return [(read_finite(x), read_finite(y)) for x, y in points]
    except (TypeError, ValueError):
        what = f"points {str(points)[:60]} of a {shape.get('shape_type')}: write [[x, y], ...]"
        raise DataError("malformed box", what) from None
