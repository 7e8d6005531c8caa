"""Drawing samples of a data set with their boxes and phrases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .datasets import describe, get_metadata, load_file, locate_dataset
from .images import read_image
from .records import Record
from .visualization import contact_sheet, draw_boxes

COLUMNS = 4


def draw_samples(
    name: str,
    out: Path,
    image_folder: Path | None = None,
    *,
    count: int = 12,
    seed: int = 0,
) -> str:
    """Writes a sheet of `count` images drawn at random: each with its boxes, labelled by class or
    phrase, and under it its caption or its file's name. Returns what the data set is, a line."""
    place = locate_dataset(name, image_folder)
    records = load_file(place)
    if not len(records):
        raise ValueError(f"{place.file} has no images, so there is nothing to draw")
    names = get_metadata(place.name).thing_classes
    rng = np.random.default_rng(seed)
    chosen = sorted(rng.choice(len(records), size=min(count, len(records)), replace=False).tolist())
    pictures, captions = [], []
    for i in chosen:
        record = records[i]
        phrases = phrases_of(record, names)
        boxes = [_corners(annotation["bbox"]) for annotation in record["annotations"]]
        order = np.argsort([(b[2] - b[0]) * (b[3] - b[1]) for b in boxes], kind="stable").tolist()
        pictures.append(
            draw_boxes(read_image(record), [boxes[k] for k in order], [phrases[k] for k in order])
        )
        captions.append(record.get("caption") or Path(record["file_name"]).name)
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(contact_sheet(pictures, COLUMNS, captions)).save(out)
    return describe(place, records)


def phrases_of(record: Record, names: list[str]) -> list[str]:
    """The phrase of each annotation; crowds are marked as such."""
    phrases = []
    for annotation in record["annotations"]:
        index = annotation["category_id"]
        if "caption" in record:
            spans = record["phrase_spans"][index]
            phrase = " ".join(record["caption"][start:end] for start, end in spans)
        else:
            phrase = names[index]
        phrases.append(f"{phrase} (crowd)" if annotation["iscrowd"] else phrase)
    return phrases


def _corners(box: list[float]) -> list[float]:
    x, y, w, h = box
    return [x, y, x + w, y + h]
