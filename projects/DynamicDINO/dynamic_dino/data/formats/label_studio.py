"""Label Studio: one JSON file of tasks, as its exports JSON and JSON-MIN write it.

Rectangles, polygons and ellipses, in per cent of the image, give boxes, of turned ones those around
them; key points and brush strokes have none: they are left out and counted. Of a task's annotations
that which is marked as ground truth counts, else the first that was not cancelled. Tasks that
nobody annotated are left out and counted; predictions that nobody accepted aren't read.

The name of an uploaded image is found without the eight digits that Label Studio puts before it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ..fields import brief, read_finite, read_flag
from ..image_files import SUFFIXES, UNREAD_SUFFIXES
from ..problems import DataError, require_fields
from .collector import Collector
from .cvat import rotate
from .recognise import LABEL_STUDIO_NAMES, Recognised
from .text import read_json


def read(found: Recognised, into: Collector) -> None:
    for part, file in found.files:
        for i, task in enumerate(read_json(file)):
            where = f"{file}: task {task.get('id', i) if isinstance(task, dict) else i}"
            try:
                _read_task(task, file, where, into, into.wants(part))
            except DataError as error:
                into.problem(error, where)


def _read_task(task: Any, file: Path, where: str, into: Collector, wanted: bool) -> None:
    if not isinstance(task, dict):
        raise DataError("missing field", "it is no task: export the project as JSON or JSON-MIN")
    results = _results(task, into)
    if results is None:
        if wanted:
            into.notes["left out {n} tasks that nobody annotated"] += 1
        return
    image = _add_image(task, results, file, where, into) if wanted else None
    for i, (item, value) in enumerate(results):
        place = f"{where}, result {i + 1}"
        names = next((value[key] for key in LABEL_STUDIO_NAMES if value.get(key)), None)
        try:
            size = _size(item) or (image is not None and into.size_of(image)) or (100, 100)
            points = _outline(value, size)
            if points is None or (names is None and value.keys() & {"choices", "text", "rating"}):
                into.notes["left out {n} results that have no box"] += 1
                continue
            if not isinstance(names, list):
                raise DataError("category without a name", "its shape has no label: give it one")
            for name in names:
                into.name(name)
        except DataError as error:
            into.problem(error, place)
            continue
        if image is None:
            continue
        for name in names:
            into.hull(image, name, [(round(x, 3), round(y, 3)) for x, y in points], place)


def _results(task: dict, into: Collector) -> list[tuple[dict, dict]] | None:
    """(result, its value) of the annotation that counts; None if there is none."""
    if "data" not in task:  # JSON-MIN has the values of all results in lists by their name
        lists = [v for v in task.values() if isinstance(v, list)]
        return [(item, item) for items in lists for item in items if isinstance(item, dict)]
    annotations = _objects(task, "annotations") or _objects(task, "completions")
    good = [a for a in annotations if not read_flag(a.get("was_cancelled"), "was_cancelled")]
    if not good:
        return None
    if len(good) > 1:
        into.notes["{n} tasks have several annotations, of which one was taken"] += 1
    true = (a for a in good if read_flag(a.get("ground_truth"), "ground_truth"))
    chosen = next(true, good[0])
    require_fields(chosen, "result")
    results = [r for r in _objects(chosen, "result") if r.get("type") != "relation"]
    shapes = [(r, r.get("value")) for r in results]
    for _, value in shapes:
        if not isinstance(value, dict):
            raise DataError("missing field", f"'value' is {brief(value)}: export it again")
    # <Rectangle> with <Labels> writes a shape twice, without and with its label
    named = {str(r.get("id")) for r, value in shapes if value.keys() & set(LABEL_STUDIO_NAMES)}
    return [
        (r, value)
        for r, value in shapes
        if value.keys() & set(LABEL_STUDIO_NAMES) or str(r.get("id")) not in named
    ]


def _objects(item: dict, field: str) -> list[dict]:
    """Raises DataError for what is there but no list of objects."""
    value = item.get(field)
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError("missing field", f"{field!r} is {brief(value)}, no list: export it again")
    for i, entry in enumerate(value):
        if not isinstance(entry, dict):
            what = f"{field}[{i}] is {brief(entry)}, no object: export it again"
            raise DataError("missing field", what)
    return value


def _add_image(task: dict, results: list, file: Path, where: str, into: Collector) -> int:
    hints = [hint for text in _addresses(task.get("data", task)) for hint in _file_names(text)]
    if not hints:
        what = "it has no field with the address of an image: only images can be read"
        raise DataError("missing field", what)
    sizes = [size for item, _ in results if (size := _size(item))]
    for item, _ in results:
        if item.get("image_rotation"):
            what = f"the image was turned by {item['image_rotation']} degrees: turn the file itself"
            raise DataError("turned image", what)
    return into.image(into.pictures.find(hints, file), where, sizes[0] if sizes else None, hints[0])


def _addresses(data: Any) -> Iterator[str]:
    for value in data.values() if isinstance(data, dict) else ():
        if isinstance(value, str) and unquote(value).lower().endswith(SUFFIXES + UNREAD_SUFFIXES):
            yield value


def _file_names(address: str) -> Iterator[str]:
    """Under which names a file may lie: that of local storage, whose root is often that of the file
    system, the whole path, the upload's."""
    parts = urlsplit(address)
    for local in parse_qs(parts.query).get("d", ()):
        yield from (f"/{local.lstrip('/')}", local)
    path = unquote(parts.path) if parts.scheme or parts.query else unquote(address)
    yield path.lstrip("/")
    folder, _, name = path.rpartition("/")
    if re.match(r"[0-9a-f]{8}-", name):
        yield name[9:]


def _size(item: dict) -> tuple[Any, Any] | None:
    size = item.get("original_width"), item.get("original_height")
    return None if None in size else size


def _outline(value: dict, size: tuple[Any, Any]) -> list[tuple[float, float]] | None:
    """Points in pixels around which the box lies, None for what has none; raises DataError."""
    try:
        width, height = (read_finite(side) / 100 for side in size)
        if "points" in value:
            return [(read_finite(x) * width, read_finite(y) * height) for x, y in value["points"]]
        turn = math.radians(read_finite(0 if value.get("rotation") is None else value["rotation"]))
        if "radiusX" in value:
            x, y = read_finite(value["x"]) * width, read_finite(value["y"]) * height
            a, b = read_finite(value["radiusX"]) * width, read_finite(value["radiusY"]) * height
            w = math.hypot(a * math.cos(turn), b * math.sin(turn))
            h = math.hypot(a * math.sin(turn), b * math.cos(turn))
            return [(x - w, y - h), (x + w, y + h)]
        if not {"x", "y", "width", "height"} <= value.keys():
            return None
        x, y, w, h = (read_finite(value[key]) for key in ("x", "y", "width", "height"))
        left, top, right, bottom = x * width, y * height, (x + w) * width, (y + h) * height
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        return rotate(corners, (left, top), turn)
    except (KeyError, OverflowError, TypeError, ValueError):
        what = f"{str(value)[:80]} are not numbers in per cent: correct or remove it"
        raise DataError("malformed box", what) from None
