"""Reading grounding data, captions whose phrases have boxes: ODVG JSONL and MDETR JSON."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from .boxes import read_box, read_size
from .catalog import replace_metadata, require_file
from .coco_json import CocoFile
from .columns import Columns
from .fields import brief, is_text, read_list, read_name, read_number, read_path
from .json_stream import stream_jsonl
from .label_map import read_label_map
from .problems import BadBoxes, DataError, Dropped, Reporter, refuse, require_fields
from .records import Records

Spans = tuple[tuple[int, int], ...]
EXACT = 1 << 53  # numbers as large as this may have been rounded


def load_odvg_jsonl(
    jsonl_file: str | Path,
    image_root: str | Path,
    name: str | None = None,
    *,
    bad_boxes: BadBoxes = "error",
    remedy: str = "",
    report: Reporter | None = None,
) -> Records:
    """Reads the ODVG format of Open-GroundingDino, one JSON object a line, either grounding
    ``{"filename", "height", "width", "grounding": {"caption", "regions": [...]}}``, each region
    ``{"bbox": [x1, y1, x2, y2], "phrase": str, "tokens_positive": [[start, end], ...]}``, or
    detection ``{..., "detection": {"instances": [{"bbox", "category": str}, ...]}}``.

    A grounding record has "caption" and "phrase_spans", a list of [start, end] characters per
    phrase; "category_id" is the index of the phrase. Regions with the same phrase share it. A
    phrase without "tokens_positive" stands where it first occurs in the caption; with it, "phrase"
    isn't needed. A region may have a list of boxes.

    The classes of detection records are those of label_map.json beside the file, and the further
    "category" names in the order of their appearance.

    `bad_boxes` and `report` are those of `load_coco_json`. Raises FileNotFoundError or ValueError
    naming the file, the line and the remedy.
    """
    jsonl_file, image_root = Path(jsonl_file), Path(image_root)
    name = str(jsonl_file) if name is None else name
    require_file(jsonl_file, remedy)
    dropped = Dropped()
    report = report or (dropped if bad_boxes == "drop" else refuse)
    columns = Columns()
    classes = {name: i for i, name in enumerate(dict.fromkeys(read_label_map(jsonl_file)))}
    for number, line in stream_jsonl(jsonl_file):
        try:
            _read_line(number, line, columns, classes, report, f"{jsonl_file}, line {number}")
        except DataError as error:
            report(error.at(f"{jsonl_file}, line {number}"))
    columns.close()

    def where(i: int) -> str:
        image, number = columns.image[i], int(columns.number[i])
        part = "detection.instances" if columns.extra[image] is None else "grounding.regions"
        line = f"{jsonl_file}, line {columns.ids[image]}"
        return f"{line}: {part}[{number}], image {columns.names[image]!r}"

    columns.fit(jsonl_file, "xyxy", report, where)
    dropped.log(jsonl_file)
    replace_metadata(
        name,
        thing_classes=list(classes) if None in columns.extra else [],
        json_file=str(jsonl_file),
        image_root=str(image_root),
        evaluator_type="grounding",
    )
    return columns.records(name, image_root, columns.key)


def load_mdetr_json(
    json_file: str | Path,
    image_root: str | Path,
    name: str | None = None,
    *,
    whole_caption: bool = False,
    bad_boxes: BadBoxes = "error",
    evaluator_type: str = "grounding",
    remedy: str = "",
    report: Reporter | None = None,
) -> Records:
    """Reads MDETR's format: COCO JSON whose images have a "caption" and whose annotations have
    "tokens_positive", the [start, end] characters of their phrase.

    Records are as those of `load_odvg_jsonl`; "image_id" is the file's image id, one a caption.

    whole_caption  the caption is the one phrase of every box, whatever "tokens_positive" says:
                   referring expressions are scored so

    `bad_boxes` and `report` are those of `load_coco_json`. Raises FileNotFoundError or ValueError
    naming the file, the field and the remedy.
    """
    json_file, image_root = Path(json_file), Path(image_root)
    name = str(json_file) if name is None else name
    dropped = Dropped()
    report = report or (dropped if bad_boxes == "drop" else refuse)

    def read_image(image: dict) -> tuple[str, dict]:
        require_fields(image, "file_name", "caption")
        return read_path(image, "file_name"), {"caption": read_caption(image), "phrase_spans": []}

    def read_key(annotation: dict) -> Spans | None:
        if whole_caption:
            return None
        require_fields(annotation, "tokens_positive")
        return read_spans(annotation["tokens_positive"])

    file = CocoFile(json_file, remedy, report, read_image, read_key, CocoFile.LISTS[:2])
    columns = file.columns
    lengths = np.array([len(extra["caption"]) for extra in columns.extra] + [0])
    ends = np.array([max(end for _, end in key) if key else 0 for key in file.keys] + [0])
    file.leave_out(
        ends[columns.key] > lengths[columns.image],
        "phrase outside the caption",
        lambda i: (
            outside_caption(
                file.keys[columns.key[i]], columns.extra[columns.image[i]]["caption"]
            ).what
        ),
    )
    file.fit()
    dropped.log(json_file)
    replace_metadata(
        name,
        thing_classes=[],
        json_file=str(json_file),
        image_root=str(image_root),
        evaluator_type=evaluator_type,
    )
    return columns.records(name, image_root, _number_phrases(columns, file.keys))


def _number_phrases(columns: Columns, keys: list[Spans | None]) -> np.ndarray:
    """int64 [M], the index of each annotation's phrase among those of its image, which are
    written to the image's "phrase_spans"."""
    classes = np.zeros(len(columns.key), dtype=np.int64)
    indices: dict[tuple[int, int], int] = {}  # (image, key)
    for i, pair in enumerate(zip(columns.image.tolist(), columns.key.tolist(), strict=True)):
        if pair not in indices:
            extra = columns.extra[pair[0]]
            indices[pair] = len(extra["phrase_spans"])
            extra["phrase_spans"].append(keys[pair[1]] or ((0, len(extra["caption"])),))
        classes[i] = indices[pair]
    return classes


def _read_line(
    number: int, line: Any, columns: Columns, classes: dict[str, int], report: Reporter, where: str
) -> None:
    """Adds a line's image and boxes; "key" is the index of the phrase or class."""
    require_fields(line, "filename", "height", "width")
    name = read_path(line, "filename")
    size = read_size(line, name)
    if "detection" in line:
        require_fields(line["detection"], "instances")
        caption, part = None, "detection.instances"
        items = read_list(line["detection"], "instances")
    else:
        require_fields(line, "grounding")
        require_fields(line["grounding"], "caption", "regions")
        caption, part = read_caption(line["grounding"]), "grounding.regions"
        items = read_list(line["grounding"], "regions")
    phrases: dict[Spans, int] = {}
    image = columns.add_image(name, number, size)
    for j, item in enumerate(items):
        try:
            require_fields(item, "bbox")
            boxes = item["bbox"]
            if not (isinstance(boxes, list) and boxes and isinstance(boxes[0], list)):
                boxes = [boxes]
            boxes = [read_box(box, "xyxy") for box in boxes]
            if caption is None:
                require_fields(item, "category")
                category = read_name(item["category"], "category").strip()
                key = classes.setdefault(category, len(classes))
            else:
                key = phrases.setdefault(_find_phrase(caption, item), len(phrases))
            for box in boxes:
                columns.add_annotation(image, key, j, box)
        except DataError as error:
            report(error.at(f"{where}: {part}[{j}]"))
    if caption is not None:
        columns.extra[image] = {"caption": caption, "phrase_spans": list(phrases)}


def _find_phrase(caption: str, region: dict) -> Spans:
    if region.get("tokens_positive"):
        spans = read_spans(region["tokens_positive"])
        if max(end for _, end in spans) > len(caption):
            raise outside_caption(spans, caption)
        return spans
    phrase = region.get("phrase")
    if not isinstance(phrase, str) or not phrase.strip():
        what = f"phrase is {phrase!r}: write the words of the caption"
        raise DataError("phrase outside the caption", what)
    words = re.escape(phrase.strip())
    found = re.search(rf"(?<!\w){words}(?!\w)", caption, re.IGNORECASE)
    if not found:
        raise DataError(
            "phrase outside the caption",
            f"phrase {phrase!r} does not occur in the caption {caption!r}: use words of the "
            "caption or give tokens_positive",
        )
    return (found.span(),)


def read_caption(item: dict) -> str:
    if not is_text(item["caption"]):
        what = f"caption {brief(item['caption'])} is no text: write a sentence"
        raise DataError("bad caption", what)
    return item["caption"]


def read_spans(tokens_positive: Any) -> Spans:
    """The spans of "tokens_positive"; raises DataError where they can't be spans of any caption."""
    given = tokens_positive if isinstance(tokens_positive, list | tuple) else ()
    spans = tuple([_read_span(span) for span in given])
    if not spans or None in spans:
        raise DataError(
            "phrase outside the caption",
            f"tokens_positive {brief(tokens_positive)} are no spans: give [[start, end], ...], "
            "characters of the caption with start < end",
        )
    return spans


def _read_span(span: Any) -> tuple[int, int] | None:
    """Start and end of a span, None for what is none. A file has millions of them."""
    if type(span) not in (list, tuple) or len(span) != 2:
        return None
    start, end = span
    if type(start) is not int or type(end) is not int:  # text, 1.0
        start, end = read_number(start), read_number(end)
        if not (start.is_integer() and end.is_integer()):  # neither infinite nor NaN is
            return None
    return (int(start), int(end)) if 0 <= start < end < EXACT else None


def outside_caption(spans: Spans, caption: str) -> DataError:
    start, end = max(spans, key=lambda span: span[1])
    return DataError(
        "phrase outside the caption",
        f"tokens_positive ({start}, {end}) lies outside the caption of {len(caption)} characters "
        f"{caption!r}: correct the span",
    )
