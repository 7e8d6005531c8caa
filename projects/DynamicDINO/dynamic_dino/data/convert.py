"""Converting to COCO JSON, MDETR JSON and ODVG JSONL, from these and from tools' formats.

Detection goes to COCO and ODVG, grounding to MDETR and ODVG. A class isn't a phrase of a
caption, so that nothing else can be converted. Images, boxes, classes or captions with their
phrases are kept; ids of annotations, areas and polygons, which no reader here uses, aren't.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from ..files import written_whole
from .builtin import Format
from .datasets import describe, get_metadata, load_file, locate_dataset
from .ground_truth import categories_of
from .label_map import write_label_map
from .problems import BadBoxes
from .records import Record, Records, Texts
from .split import VAL, split_rows

_ONE_LINE = {"separators": (",", ":"), "ensure_ascii": False}


def convert_dataset(
    source: str,
    target: Path,
    to: Format,
    source_format: Format | None = None,
    *,
    bad_boxes: BadBoxes = "error",
    image_folder: Path | None = None,
    sizes_of_images: bool = False,
    crowds_as_objects: bool = False,
) -> dict[str, Any]:
    """Writes the data set `source`, a path or a built-in name, to `target`, all of it or nothing;
    of classes to ODVG, label_map.json beside it too. With `crowds_as_objects`, "iscrowd" becomes 0.

    Memory is that of `Records`, about a quarter of a kilobyte per image. Returns counts: "images",
    "boxes", and "crowds", boxes of crowds that ODVG can't hold and that are left out; and "source",
    a line that says what the source is. File names of images stay as they are in a file of COCO,
    MDETR or ODVG and in built-in data; those of others become relative to the folder of `target`.

    `sizes_of_images`: sizes are those of the image files as they are seen, whatever a file of COCO
    says, whose exporter may have written those before an EXIF tag turns the photo.

    Raises ValueError for what the target can't hold, and what the readers raise.
    """
    place = locate_dataset(source, image_folder, source_format)
    options = {"sizes_of_images": True} if sizes_of_images else {}
    if options and place.format != "coco":
        raise ValueError(f"{place.file} isn't COCO JSON, of which alone sizes are replaced")
    records = load_file(place, bad_boxes=bad_boxes, **options)
    if crowds_as_objects:
        records.crowd = np.zeros_like(records.crowd)
    metadata = get_metadata(place.name)
    grounding = records.extra is not None and any("caption" in record for record in records[:1])
    if grounding and to == "coco":
        raise ValueError(
            f"{place.file} has captions with phrases, and COCO JSON has only classes: convert it "
            "to 'odvg' or 'mdetr'"
        )
    if not grounding and to == "mdetr":
        raise ValueError(
            f"{place.file} has classes, and MDETR JSON has only captions: convert it to 'odvg' or "
            "'coco'"
        )
    counts = {"images": len(records), "boxes": len(records.boxes), "crowds": 0}
    line = describe(place, records)
    in_one_file = place.entry is not None or str(place.file) == source
    if place.found is not None or not in_one_file:
        records = beside(records, target)
    with written_whole(target) as file:
        if to == "odvg":
            counts["crowds"] = int(records.crowd.sum())
            counts["boxes"] -= counts["crowds"]
            for record, name in _with_names(records, target.name):
                file.write(json.dumps(_odvg_line(record, name, metadata), **_ONE_LINE) + "\n")
            if not grounding:
                write_label_map(target, metadata.thing_classes)
        elif to == "coco":
            write_coco(file, records, metadata, target.name)
        else:
            write_mdetr(file, records, target.name)
    return counts | {"source": line}


def write_split(
    source: str,
    folder: Path,
    val: float = VAL,
    seed: int = 0,
    image_folder: Path | None = None,
) -> dict[str, Any]:
    """Writes train.json and val.json, COCO JSON with file names relative to `folder`, into it; see
    `split_rows`. Returns counts: "train", "val", and "source", a line that says what it is.

    Raises ValueError for data that have parts already or no classes, and what the readers raise.
    """
    place = locate_dataset(source, image_folder)
    records = load_file(place)
    metadata = get_metadata(place.name)
    counts: dict[str, Any] = {"source": describe(place, records)}
    for part, rows in zip(("train", "val"), split_rows(records, val, seed), strict=True):
        target = folder / f"{part}.json"
        with written_whole(target) as file:
            write_coco(file, beside(records.select(rows), target), metadata, target.name)
        counts[part] = len(rows)
    return counts


def beside(records: Records, target: Path) -> Records:
    """The same records, with the names of their images relative to the folder of `target`."""
    root, folder = os.path.abspath(records.image_root), os.path.abspath(target.parent)
    names = [os.path.relpath(os.path.join(root, name), folder) for name in records.names]
    moved = copy.copy(records)
    moved.names, moved.image_root = Texts.of(Path(name).as_posix() for name in names), folder
    return moved


def _with_names(records: Records, title: str) -> Iterator[tuple[Record, str]]:
    """Each record and its file's name as it stands in the annotation file."""
    bar = tqdm(range(len(records)), desc=title, unit="images", delay=1, disable=None)
    return ((records[i], records.names[i]) for i in bar)


def _odvg_line(record: Record, name: str, metadata: Any) -> dict:
    line = {"filename": name, "height": record["height"], "width": record["width"]}
    objects = [a for a in record["annotations"] if not a["iscrowd"]]
    if "caption" not in record:
        instances = [
            {
                "bbox": _corners(annotation["bbox"]),
                "label": annotation["category_id"],
                "category": metadata.thing_classes[annotation["category_id"]],
            }
            for annotation in objects
        ]
        return line | {"detection": {"instances": instances}}
    caption, regions = record["caption"], []
    for annotation in objects:
        spans = record["phrase_spans"][annotation["category_id"]]
        regions.append(
            {
                "bbox": _corners(annotation["bbox"]),
                "phrase": " ".join(caption[start:end] for start, end in spans),
                "tokens_positive": spans,
            }
        )
    return line | {"grounding": {"caption": caption, "regions": regions}}


def write_coco(file: IO[str], records: Records, metadata: Any, title: str) -> None:
    """Category ids are those of a COCO source, else they count from 1."""
    categories = categories_of(metadata)
    file.write(f'{{"categories":{json.dumps(categories, **_ONE_LINE)}')
    _write_images_and_annotations(
        file,
        records,
        title,
        lambda record: {},
        lambda record, category: {"category_id": categories[category]["id"]},
    )


def write_mdetr(file: IO[str], records: Records, title: str) -> None:
    file.write('{"categories":[{"supercategory":"object","id":1,"name":"object"}]')
    _write_images_and_annotations(
        file,
        records,
        title,
        lambda record: {
            "caption": record["caption"],
            "tokens_negative": [[0, len(record["caption"])]],
        },
        lambda record, phrase: {
            "category_id": 1,
            "tokens_positive": record["phrase_spans"][phrase],
        },
    )


def _write_images_and_annotations(
    file: IO[str],
    records: Records,
    title: str,
    image_fields: Callable[[Record], dict],
    annotation_fields: Callable[[Record, int], dict],
) -> None:
    def write_list(key: str, items: Iterator[dict]) -> None:
        file.write(f',"{key}":[')
        for i, item in enumerate(items):
            file.write(",\n" if i else "\n")
            file.write(json.dumps(item, **_ONE_LINE))
        file.write("\n]")

    def images() -> Iterator[dict]:
        for record, name in _with_names(records, f"{title}: images"):
            yield {
                "id": record["image_id"],
                "file_name": name,
                "height": record["height"],
                "width": record["width"],
                **image_fields(record),
            }

    def annotations() -> Iterator[dict]:
        number = 0
        for record, _ in _with_names(records, f"{title}: boxes"):
            for annotation in record["annotations"]:
                number += 1
                x, y, w, h = (_shortest(v) for v in annotation["bbox"])
                yield {
                    "id": number,
                    "image_id": record["image_id"],
                    "bbox": [x, y, w, h],
                    "area": round(w * h, 4),
                    "iscrowd": annotation["iscrowd"],
                    **annotation_fields(record, annotation["category_id"]),
                }

    write_list("images", images())
    write_list("annotations", annotations())
    file.write("}\n")


def _corners(box: list[float]) -> list[float]:
    x, y, w, h = (_shortest(v) for v in box)
    return [x, y, round(x + w, 4), round(y + h, 4)]


def _shortest(value: float) -> float:
    """The number of fewest digits that is the same in float32, in which records keep boxes: what
    the file said, if that had no more than seven digits."""
    return float(str(np.float32(value)))
