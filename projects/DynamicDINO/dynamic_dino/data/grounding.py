"""Reading grounding data, captions whose phrases have boxes: ODVG JSONL and MDETR JSON."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from detectron2.structures import BoxMode

from .boxes import FAULTS, BadBoxes, clip_box
from .catalog import Record, read_json, replace_metadata, require, require_file

logger = logging.getLogger(__name__)


def load_odvg_jsonl(
    jsonl_file: str | Path, image_root: str | Path, name: str | None = None, *, remedy: str = ""
) -> list[Record]:
    """Reads grounding data, one JSON object a line (the ODVG format of Open-GroundingDino):
    ``{"filename", "height", "width", "grounding": {"caption", "regions": [...]}}``, each region
    ``{"bbox": [x1, y1, x2, y2], "phrase": str, "tokens_positive": [[start, end], ...]}``, of which
    the last is optional.

    A record has "caption" and "phrase_spans", a list of (start, end) characters per phrase;
    "category_id" is the index of the phrase. Regions with the same phrase share it. A phrase
    without "tokens_positive" stands where it first occurs in the caption.

    Raises FileNotFoundError or ValueError naming the file, the line and the remedy.
    """
    jsonl_file, image_root = Path(jsonl_file), Path(image_root)
    name = str(jsonl_file) if name is None else name
    require_file(jsonl_file, remedy)
    replace_metadata(
        name,
        thing_classes=[],
        json_file=str(jsonl_file),
        image_root=str(image_root),
        evaluator_type="grounding",
    )
    records, clipped = [], 0
    with jsonl_file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{jsonl_file}, line {number}"
            try:
                item = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: not valid JSON ({error}): is the file truncated?"
                ) from error
            require(where, item, "filename", "height", "width", "grounding")
            grounding = item["grounding"]
            require(f"{where}: grounding", grounding, "caption", "regions")
            caption = grounding["caption"]
            phrases: dict[tuple, int] = {}
            annotations = []
            for j, region in enumerate(grounding["regions"]):
                at = f"{where}: grounding.regions[{j}]"
                require(at, region, "bbox", "phrase")
                spans = _phrase_spans(at, caption, region)
                box = region["bbox"]
                if len(box) == 4:
                    box = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
                box, fault = clip_box(box, item["width"], item["height"])
                if fault in FAULTS:
                    raise ValueError(
                        f"{at}: bbox {region['bbox']} is {FAULTS[fault]} (image "
                        f"{item['filename']!r}, {item['width']} x {item['height']}): a bbox is "
                        "[x1, y1, x2, y2] in pixels of the image; correct or remove it"
                    )
                clipped += fault == "clipped"
                annotations.append(
                    {
                        "bbox": box,
                        "bbox_mode": BoxMode.XYWH_ABS,
                        "category_id": phrases.setdefault(spans, len(phrases)),
                        "iscrowd": 0,
                    }
                )
            records.append(
                {
                    "file_name": str(image_root / item["filename"]),
                    "image_id": number,
                    "height": item["height"],
                    "width": item["width"],
                    "dataset_name": name,
                    "caption": caption,
                    "phrase_spans": [list(spans) for spans in phrases],
                    "annotations": annotations,
                }
            )
    if clipped:
        logger.warning("%s: clipped %d boxes to their images", jsonl_file, clipped)
    return records


def load_mdetr_json(
    json_file: str | Path,
    image_root: str | Path,
    name: str | None = None,
    *,
    whole_caption: bool = False,
    bad_boxes: BadBoxes = "error",
    evaluator_type: str = "grounding",
    remedy: str = "",
) -> list[Record]:
    """Reads grounding data in MDETR's format: COCO JSON whose images have a "caption" and whose
    annotations have "tokens_positive", the [start, end] characters of their phrase.

    Records are as those of `load_odvg_jsonl`; "image_id" is the file's image id, one a caption.

    whole_caption  the caption is the one phrase of every box, whatever "tokens_positive" says:
                   referring expressions are scored so
    bad_boxes      "drop" drops and counts annotations with an impossible box or span

    Raises FileNotFoundError or ValueError naming the file, the field and the remedy.
    """
    json_file, image_root = Path(json_file), Path(image_root)
    name = str(json_file) if name is None else name
    content = read_json(json_file, remedy, "images", "annotations")
    replace_metadata(
        name,
        thing_classes=[],
        json_file=str(json_file),
        image_root=str(image_root),
        evaluator_type=evaluator_type,
    )
    records: dict[int, Record] = {}
    phrases: dict[int, dict[tuple, int]] = {}
    for i, image in enumerate(content["images"]):
        where = f"{json_file}: images[{i}]"
        require(where, image, "id", "file_name", "width", "height", "caption")
        if image["id"] in records:
            raise ValueError(f"{where}: image id {image['id']!r} occurs twice: give each its own")
        phrases[image["id"]] = {}
        records[image["id"]] = {
            "file_name": str(image_root / image["file_name"]),
            "image_id": image["id"],
            "height": int(image["height"]),  # Flickr30k's are strings
            "width": int(image["width"]),
            "dataset_name": name,
            "caption": image["caption"],
            "phrase_spans": [],
            "annotations": [],
        }
    dropped = clipped = 0
    for i, annotation in enumerate(content["annotations"]):
        where = f"{json_file}: annotations[{i}] (id {annotation.get('id')!r})"
        require(where, annotation, "image_id", "bbox")
        if annotation["image_id"] not in records:
            raise ValueError(
                f"{where}: image_id {annotation['image_id']!r} is not among the file's images: "
                "add the image or remove the annotation"
            )
        record = records[annotation["image_id"]]
        try:
            box, fault = clip_box(annotation["bbox"], record["width"], record["height"])
            if fault in FAULTS:
                raise ValueError(
                    f"{where}: bbox {annotation['bbox']} is {FAULTS[fault]} (image "
                    f"{record['file_name']!r}, {record['width']} x {record['height']}): a bbox is "
                    "[x, y, width, height] in pixels of the image; correct or remove it"
                )
            if whole_caption:
                spans = ((0, len(record["caption"])),)
            else:
                require(where, annotation, "tokens_positive")
                spans = _check_spans(where, record["caption"], annotation["tokens_positive"])
        except ValueError:
            if bad_boxes == "error":
                raise
            dropped += 1
            continue
        clipped += fault == "clipped"
        index = phrases[annotation["image_id"]].setdefault(spans, len(record["phrase_spans"]))
        if index == len(record["phrase_spans"]):
            record["phrase_spans"].append(list(spans))
        record["annotations"].append(
            {
                "bbox": box,
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": index,
                "iscrowd": int(annotation.get("iscrowd", 0)),
            }
        )
    if clipped:
        logger.warning("%s: clipped %d boxes to their images", json_file, clipped)
    if dropped:
        logger.warning("%s: dropped %d annotations with a bad box or phrase", json_file, dropped)
    return list(records.values())


def _phrase_spans(where: str, caption: str, region: dict) -> tuple[tuple[int, int], ...]:
    phrase = region["phrase"]
    if region.get("tokens_positive"):
        return _check_spans(where, caption, region["tokens_positive"])
    if not isinstance(phrase, str) or not phrase.strip():
        raise ValueError(f"{where}: phrase is {phrase!r}: write the words of the caption")
    words = re.escape(phrase.strip())
    found = re.search(rf"(?<!\w){words}(?!\w)", caption, re.IGNORECASE)
    if not found:
        raise ValueError(
            f"{where}: phrase {phrase!r} does not occur in the caption {caption!r}: use words of "
            "the caption or give tokens_positive"
        )
    return (found.span(),)


def _check_spans(where: str, caption: str, tokens_positive: list) -> tuple[tuple[int, int], ...]:
    spans = tuple((int(start), int(end)) for start, end in tokens_positive)
    for start, end in spans or ((0, 0),):
        if not 0 <= start < end <= len(caption):
            raise ValueError(
                f"{where}: tokens_positive ({start}, {end}) lies outside the caption of "
                f"{len(caption)} characters {caption!r}: correct the span"
            )
    return spans
