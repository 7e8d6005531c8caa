"""CSV: a line a box, with a header such as that of TensorFlow's tutorials,
``filename,width,height,class,xmin,ymin,xmax,ymax``, or without one as RetinaNet's
``path,x1,y1,x2,y2,class``, where a line with nothing but a path is an image without objects.

Corners are pixels from 0, the far ones outside the box. Columns may stand in any order; others are
not read. Where no size is given, it is that of the file.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from ..problems import DataError
from .collector import Collector
from .recognise import RETINANET, Recognised, csv_columns
from .text import read_text
from .xml import number

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read(found: Recognised, into: Collector) -> None:
    for part, file in found.files:
        images: dict[str, int | None] = {}
        for line, row in _rows(file):
            where = f"{file}, line {line}"
            try:
                _read_row(row, file, where, images, into, into.wants(part))
            except DataError as error:
                into.problem(error, where)


def _read_row(
    row: dict[str, str],
    file: Path,
    where: str,
    images: dict[str, int | None],
    into: Collector,
    wanted: bool,
) -> None:
    named = row.get("image", "")
    if not named:
        raise DataError("missing field", "it names no image: add its file name or remove the line")
    if wanted and named not in images:
        images[named] = None  # a second line says no more of what is wrong with it
        sides = row.get("width"), row.get("height")
        size = sides if all(sides) else None
        images[named] = into.image(into.pictures.find([named], file), where, size, named)
    corners = [row.get(key, "") for key in CORNERS]
    if not any(corners) and not row.get("class"):
        return
    into.name(row.get("class"))
    values = [number(v, key) for v, key in zip(corners, CORNERS, strict=True)]
    image = images.get(named)
    if image is not None:
        into.box(image, row["class"], values, where)


def _rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, column -> text)."""
    lines = read_text(file).splitlines(keepends=True)
    columns, delimiter = csv_columns(lines[0])
    header = columns is not None
    reader = csv.reader(lines, delimiter=delimiter)
    try:
        for row in reader:
            if (reader.line_num == 1 and header) or not any(row):
                continue
            wanted = columns or RETINANET
            needed = max(i for i, key in enumerate(wanted) if key) + 1
            if any(row[1:]) and len(row) < needed:  # more than a path: an object
                what = f"it has {len(row)} of {needed} columns: complete it; is the file truncated?"
                raise DataError("unreadable file", what, f"{file}, line {reader.line_num}")
            pairs = zip(wanted, row, strict=False)
            yield reader.line_num, {key: v.strip() for key, v in pairs if key is not None}
    except csv.Error as error:
        what = f"not valid CSV ({error}): correct or remove the line"
        raise DataError("unreadable file", what, f"{file}, line {reader.line_num}") from None
