"""Reading what was recognised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..builtin import Format
from ..problems import BadBoxes, DataError, Dropped, Reporter, refuse
from ..records import Records
from . import csv_table, cvat, label_studio, labelme, voc, yolo
from .collector import Collector
from .pictures import Pictures
from .recognise import TITLES, Recognised

READERS: dict[Format, Callable[[Recognised, Collector], None]] = {
    "voc": voc.read,
    "yolo": yolo.read,
    "labelme": labelme.read,
    "cvat": cvat.read,
    "labelstudio": label_studio.read,
    "csv": csv_table.read,
}
ORDERED = ("yolo", "cvat")  # formats that give their names an order


def parts_of(found: Recognised) -> list[str]:
    """The parts of which each can be read by itself: "train", "val", "test"; [] if it has none."""
    first = found.files[0][1]
    if found.format == "yolo" and first.suffix in (".yaml", ".yml"):
        try:
            return list(yolo.parts_of_settings(first, yolo.read_settings(first)))
        except DataError:  # the reader says it
            return []
    if found.format == "voc" and (sets := voc.image_sets(found.path)):
        return list(sets)
    if found.format == "cvat" and len(found.files) == 1 and (subsets := cvat.subsets(first)):
        return subsets
    tags = {part for part, _ in found.files if part}
    return [part for part in ("train", "val", "test") if part in tags]


def load_recognised(
    found: Recognised,
    image_root: str | Path,
    name: str,
    part: str | None = None,
    *,
    bad_boxes: BadBoxes = "error",
    report: Reporter | None = None,
) -> Records:
    """Reads and checks one part of a data set, or all of it; returns one record per image.

    Names are those of all parts, so that train and val have the same. Sets the metadata of `name`;
    `bad_boxes` and `report` are those of `load_coco_json`.

    Raises ValueError naming the file, the field and the remedy.
    """
    dropped = Dropped()
    report = report or (dropped if bad_boxes == "drop" else refuse)
    into = Collector(found.path, Pictures(Path(image_root)), part, report)
    try:
        READERS[found.format](found, into)
    except DataError as error:
        raise ValueError(str(error if error.where else error.at(str(found.path)))) from None
    records = into.records(name, TITLES[found.format], found.format in ORDERED)
    dropped.log(found.path)
    return records
