"""CVAT for images 1.1: one XML file, with <image> elements and shapes in pixels.

Boxes, polygons, ellipses and masks give boxes, of turned ones those around them; points, lines,
cuboids and skeletons have none: they are left out and counted. The names are those of the task's
labels, also such without boxes. An image may say its part, `subset`.
"""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree.ElementTree import Element

from ..problems import DataError
from .collector import Collector
from .recognise import Recognised, named_part
from .xml import number, read_xml

SHAPES = ("box", "polygon", "ellipse", "mask")
NO_BOX = ("polyline", "points", "cuboid", "skeleton")


def read(found: Recognised, into: Collector) -> None:
    for part, file in found.files:
        try:
            root = read_xml(file)
            if root.find("track") is not None:
                what = "it is of a video, with <track>: export it as 'CVAT for images 1.1'"
                raise DataError("unreadable file", what)
            _read_labels(root, into)
        except DataError as error:
            into.problem(error, str(file))
            continue
        for item in root.iter("image"):
            subset = named_part(item.get("subset") or "") or part
            _read_image(item, file, into, into.wants(subset))


def subsets(file: Path) -> list[str]:
    """The parts that the images of a file are of; none where one has none."""
    try:
        found = [named_part(item.get("subset") or "") for item in read_xml(file).iter("image")]
    except DataError:  # the reader says it
        return []
    return [] if None in found else sorted({part for part in found if part})


def _read_labels(root: Element, into: Collector) -> None:
    for meta in root.iter("meta"):
        for label in meta.iter("label"):
            kind = label.findtext("type") or "any"
            if label.find("parent") is None and kind in ("any", "bbox", "rectangle", *SHAPES):
                into.name(label.findtext("name"))


def _read_image(item: Element, file: Path, into: Collector, wanted: bool) -> None:
    named = item.get("name") or ""
    where = f"{file}: image {named!r}"
    try:
        size = item.get("width"), item.get("height")
        path = into.pictures.find([named], file) if wanted else None
        image = into.image(path, where, None if None in size else size, named) if wanted else None
    except DataError as error:
        into.problem(error, where)
        return
    for i, shape in enumerate(item):
        if shape.tag in NO_BOX:
            into.notes["left out {n} points, lines, cuboids or skeletons, which have no box"] += 1
        if shape.tag not in SHAPES:
            continue
        place = f"{where}, shape {i + 1} <{shape.tag}>"
        try:
            into.name(shape.get("label"))
            points = _outline(shape)
        except DataError as error:
            into.problem(error, place)
            continue
        if image is not None:
            if shape.tag == "box" and not _angle(shape):
                into.box(image, shape.get("label"), [*points[0], *points[2]], place)
            else:
                into.hull(image, shape.get("label"), points, place)


def _outline(shape: Element) -> list[tuple[float, float]]:
    """Points around which the box lies."""

    def value(field: str) -> float:
        return number(shape.get(field), field)

    if shape.tag == "polygon":
        pairs = [pair.split(",") for pair in (shape.get("points") or "").split(";")]
        if any(len(pair) != 2 for pair in pairs):
            what = f"points are {str(shape.get('points'))[:60]!r}: write 'x,y;x,y;x,y'"
            raise DataError("malformed box", what)
        return [(number(x, "points"), number(y, "points")) for x, y in pairs]
    if shape.tag == "ellipse":
        x, y, a, b, turn = value("cx"), value("cy"), value("rx"), value("ry"), _angle(shape)
        w = math.hypot(a * math.cos(turn), b * math.sin(turn))
        h = math.hypot(a * math.sin(turn), b * math.cos(turn))
        return [(x - w, y - h), (x + w, y + h)]
    if shape.tag == "mask":
        x, y = value("left"), value("top")
        return [(x, y), (x + value("width"), y + value("height"))]
    left, top, right, bottom = (value(field) for field in ("xtl", "ytl", "xbr", "ybr"))
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return rotate(corners, ((left + right) / 2, (top + bottom) / 2), _angle(shape))


def rotate(
    points: list[tuple[float, float]], centre: tuple[float, float], angle: float
) -> list[tuple[float, float]]:
    """By an angle in radians, clockwise as y grows downwards."""
    if not angle:
        return points
    (x, y), cos, sin = centre, math.cos(angle), math.sin(angle)
    return [
        (x + (a - x) * cos - (b - y) * sin, y + (a - x) * sin + (b - y) * cos) for a, b in points
    ]


def _angle(shape: Element) -> float:
    return math.radians(number(shape.get("rotation") or "0", "rotation"))
