"""Data sets: where they lie, how they are read, and what is wrong with them if they can't be.

Everything is a list of Detectron2 records. Built-in names live under ``DETECTRON2_DATASETS``
(default ``datasets``); any COCO JSON or ODVG JSONL file can be used by its path, without code.
Each record carries ``dataset_name``, so that several data sets can be mixed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.structures import BoxMode

logger = logging.getLogger(__name__)

Record = dict[str, Any]
BadBoxes = Literal["error", "drop"]
_METADATA = ("thing_classes", "frequency", "novel", "near_synonyms")


def dataset_root() -> Path:
    """The folder of the built-in data sets: ``$DETECTRON2_DATASETS``, else ``datasets``."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def load_datasets(names: str | Sequence[str]) -> list[Record] | list[list[Record]]:
    """The records of one data set, or a list of them, one entry a data set.

    A name is a registered one or a path that ends in ``.json`` (COCO) or ``.jsonl`` (ODVG); image
    file names are then relative to the folder of that file.
    """
    if not isinstance(names, str):
        return [load_datasets(name) for name in names]
    if names in DatasetCatalog:
        return DatasetCatalog.get(names)
    if names.endswith(".json"):
        return load_coco_json(names, Path(names).parent)
    if names.endswith(".jsonl"):
        return load_odvg_jsonl(names, Path(names).parent)
    known = ", ".join(name for name in DatasetCatalog.list() if name in _BUILTIN)
    raise ValueError(
        f"unknown data set {names!r}: use a built-in name ({known}), a name that you registered "
        "with register_coco_json, or the path of a COCO .json or an ODVG .jsonl file"
    )


def get_metadata(name: str) -> Metadata:
    """The data set's metadata with ``thing_classes`` filled in, reading its file where needed."""
    if not hasattr(MetadataCatalog.get(name), "thing_classes"):
        load_datasets(name)
    return MetadataCatalog.get(name)


def register_coco_json(
    name: str,
    json_file: str | Path,
    image_root: str | Path,
    *,
    bad_boxes: BadBoxes = "error",
    remedy: str = "",
) -> None:
    """Makes a COCO-format data set available by name; a name that exists is replaced.

    The file is read when the data set is first used. `remedy` completes the error message that is
    given when it doesn't exist.
    """

    def load() -> list[Record]:
        return load_coco_json(json_file, image_root, name, bad_boxes=bad_boxes, remedy=remedy)

    _register(name, load, json_file, image_root, "coco")


def register_odvg_jsonl(
    name: str, jsonl_file: str | Path, image_root: str | Path, *, remedy: str = ""
) -> None:
    """Makes a grounding data set available by name, see `register_coco_json`."""

    def load() -> list[Record]:
        return load_odvg_jsonl(jsonl_file, image_root, name, remedy=remedy)

    _register(name, load, jsonl_file, image_root, "grounding")


def load_coco_json(
    json_file: str | Path,
    image_root: str | Path,
    name: str | None = None,
    *,
    bad_boxes: BadBoxes = "error",
    remedy: str = "",
) -> list[Record]:
    """Reads and checks a COCO JSON file; returns one record per image, in the file's order.

    Sets the metadata of `name` (default: the path of the file, with which the mappers and
    `get_metadata` find it): ``thing_classes`` in the order of the category ids and, where the
    categories have these fields, ``frequency``, ``novel`` and ``near_synonyms`` (in the file: a
    list of category ids or names; here: contiguous ids, made symmetric).

    A box that reaches over the border is clipped and counted in a warning. One that is not positive
    or lies fully outside raises, or is dropped and counted with ``bad_boxes="drop"``, which is
    meant for published files with known mistakes.

    Raises FileNotFoundError or ValueError naming the file, the field and the remedy.
    """
    json_file, image_root = Path(json_file), Path(image_root)
    name = str(json_file) if name is None else name
    content = _read_json(json_file, remedy)
    categories = _check_categories(json_file, content["categories"])
    contiguous = {category["id"]: i for i, category in enumerate(categories)}
    _set_metadata(name, json_file, image_root, categories, contiguous)

    records: dict[Any, Record] = {}
    for i, image in enumerate(content["images"]):
        where = f"{json_file}: images[{i}]"
        _require(where, image, "id", "file_name", "width", "height")
        if image["id"] in records:
            raise ValueError(
                f"{where}: image id {image['id']!r} occurs twice: give every image one"
            )
        if not (image["width"] > 0 and image["height"] > 0):
            raise ValueError(
                f"{where}: size {image['width']} x {image['height']} of {image['file_name']!r}: "
                "write the size of the image in pixels"
            )
        records[image["id"]] = {
            "file_name": str(image_root / image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "dataset_name": name,
            "annotations": [],
        }

    counts, seen = Counter(), set()
    for i, annotation in enumerate(content["annotations"]):
        where = f"{json_file}: annotations[{i}] (id {annotation.get('id')!r})"
        _require(where, annotation, "image_id", "category_id", "bbox")
        if "id" in annotation:
            if annotation["id"] in seen:
                raise ValueError(f"{where}: this id occurs twice: give every annotation its own")
            seen.add(annotation["id"])
        if annotation["image_id"] not in records:
            raise ValueError(
                f"{where}: image_id {annotation['image_id']!r} is not among the file's images: "
                "add the image or remove the annotation"
            )
        if annotation["category_id"] not in contiguous:
            raise ValueError(
                f"{where}: category_id {annotation['category_id']!r} is not among the file's "
                "categories: add the category with its name or remove the annotation"
            )
        record = records[annotation["image_id"]]
        box, fault = _clip_box(annotation["bbox"], record["width"], record["height"])
        counts[fault] += 1
        if fault in ("malformed", "empty", "outside"):
            if bad_boxes == "drop":
                continue
            raise ValueError(
                f"{where}: bbox {annotation['bbox']} is {_FAULTS[fault]} (image "
                f"{record['file_name']!r}, {record['width']} x {record['height']}): a bbox is "
                "[x, y, width, height] in pixels of the image; correct or remove it, or load the "
                'file with bad_boxes="drop"'
            )
        record["annotations"].append(
            {
                "bbox": box,
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": contiguous[annotation["category_id"]],
                "iscrowd": int(annotation.get("iscrowd", 0)),
            }
        )
    if counts["clipped"]:
        logger.warning("%s: clipped %d boxes to their images", json_file, counts["clipped"])
    dropped = counts["malformed"] + counts["empty"] + counts["outside"]
    if dropped:
        logger.warning("%s: dropped %d malformed, empty or outside boxes", json_file, dropped)
    return list(records.values())


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
    _require_file(jsonl_file, remedy)
    _replace_metadata(
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
            _require(where, item, "filename", "height", "width", "grounding")
            grounding = item["grounding"]
            _require(f"{where}: grounding", grounding, "caption", "regions")
            caption = grounding["caption"]
            phrases: dict[tuple, int] = {}
            annotations = []
            for j, region in enumerate(grounding["regions"]):
                at = f"{where}: grounding.regions[{j}]"
                _require(at, region, "bbox", "phrase")
                spans = _phrase_spans(at, caption, region)
                box = region["bbox"]
                if len(box) == 4:
                    box = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
                box, fault = _clip_box(box, item["width"], item["height"])
                if fault in _FAULTS:
                    raise ValueError(
                        f"{at}: bbox {region['bbox']} is {_FAULTS[fault]} (image "
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


_FAULTS = {
    "malformed": "not four finite numbers",
    "empty": "without a positive width and height",
    "outside": "outside the image",
}


def _clip_box(box: Any, width: float, height: float) -> tuple[list[float], str | None]:
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


def _phrase_spans(where: str, caption: str, region: dict) -> tuple[tuple[int, int], ...]:
    phrase = region["phrase"]
    if region.get("tokens_positive"):
        spans = tuple((int(start), int(end)) for start, end in region["tokens_positive"])
        for start, end in spans:
            if not 0 <= start < end <= len(caption):
                raise ValueError(
                    f"{where}: tokens_positive ({start}, {end}) of phrase {phrase!r} lies outside "
                    f"the caption of {len(caption)} characters {caption!r}: correct the span"
                )
        return spans
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


def _register(
    name: str, load: Callable[[], list[Record]], file: str | Path, image_root: str | Path, kind: str
) -> None:
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
    _replace_metadata(name, json_file=str(file), image_root=str(image_root), evaluator_type=kind)
    DatasetCatalog.register(name, load)


def _require_file(path: Path, remedy: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: {remedy or 'check the path of the data set'} "
            f"(data sets are looked for under DETECTRON2_DATASETS, now {str(dataset_root())!r})"
        )


def _read_json(path: Path, remedy: str) -> dict:
    _require_file(path, remedy)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): the file may be truncated; write or download "
            "it again"
        ) from error
    for field in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(field), list):
            raise ValueError(
                f"{path} has no list {field!r}: a COCO detection file has the lists 'images', "
                "'annotations' and 'categories'"
            )
    return content


def _require(where: str, item: Any, *fields: str) -> None:
    for field in fields:
        if not isinstance(item, dict) or item.get(field) is None:
            raise ValueError(f"{where} has no {field!r}: add this field")


def _check_categories(path: Path, categories: list) -> list[dict]:
    """The categories in the order of their ids."""
    if not categories:
        raise ValueError(f"{path}: 'categories' is empty: list every category with id and name")
    ids = set()
    for i, category in enumerate(categories):
        where = f"{path}: categories[{i}]"
        _require(where, category, "id")
        name = category.get("name")
        if not isinstance(name, str) or not re.search(r"\w", name):
            raise ValueError(
                f"{where} (id {category['id']!r}) has no name (got {name!r}): the name is the "
                "phrase that the detector reads; write one in plain words"
            )
        if category["id"] in ids:
            raise ValueError(f"{where}: category id {category['id']!r} occurs twice: renumber it")
        ids.add(category["id"])
    return sorted(categories, key=lambda category: category["id"])


def _set_metadata(
    name: str, json_file: Path, image_root: Path, categories: list[dict], contiguous: dict
) -> None:
    fields: dict[str, Any] = {
        "thing_classes": [category["name"].strip() for category in categories],
        "thing_dataset_id_to_contiguous_id": contiguous,
        "json_file": str(json_file),
        "image_root": str(image_root),
        "evaluator_type": "coco",
    }
    if any("frequency" in category for category in categories):
        for category in categories:
            if category.get("frequency") not in ("r", "c", "f", None):
                raise ValueError(
                    f"{json_file}: category {category['name']!r} has frequency "
                    f"{category['frequency']!r}: use 'r' (rare), 'c' (common), 'f' (frequent) or "
                    "leave the field out"
                )
        fields["frequency"] = [category.get("frequency") for category in categories]
    if any("novel" in category for category in categories):
        fields["novel"] = [bool(category.get("novel", False)) for category in categories]
    if any("near_synonyms" in category for category in categories):
        fields["near_synonyms"] = _near_synonyms(json_file, categories, contiguous)
    _replace_metadata(name, **fields)


def _near_synonyms(path: Path, categories: list[dict], contiguous: dict) -> list[list[int]]:
    by_name = {category["name"]: i for i, category in enumerate(categories)}
    related: list[set[int]] = [set() for _ in categories]
    for i, category in enumerate(categories):
        for other in category.get("near_synonyms") or ():
            if isinstance(other, str) and other not in by_name:
                continue  # a name of another split can't be a negative here
            j = by_name[other] if isinstance(other, str) else contiguous.get(other)
            if j is None:
                raise ValueError(
                    f"{path}: near_synonyms of category {category['name']!r} has {other!r}, which "
                    "is not the id of a category of this file: use ids or names of categories"
                )
            related[i].add(j)
            related[j].add(i)
    return [sorted(ids - {i}) for i, ids in enumerate(related)]


def _replace_metadata(name: str, **fields: Any) -> None:
    """Metadata attributes can't be overwritten, so that a changed file needs a fresh entry."""
    if name in MetadataCatalog:
        MetadataCatalog.remove(name)
    MetadataCatalog.get(name).set(**fields)


_STAMPS = "make it with `python -m dynamic_dino.data.stamps`"
_DRAWN = "make it with `python -m dynamic_dino.data.drawn`"
_COCO = "download COCO 2017 from https://cocodataset.org/#download and unpack it there"
_O365 = "download Objects365 v1 from https://www.objects365.org and unpack it there"
_V3DET = "download V3Det from https://v3det.openxlab.org.cn and unpack it there"
_GOLDG = "convert GoldG to ODVG JSONL, one JSON object a line, and put it there"
# name: (annotations, image folder, what to do when the annotations are missing)
_BUILTIN: dict[str, tuple[str, str, str]] = {
    **{
        f"{family}_{split}": (f"{family}/annotations/{split}.json", f"{family}/{split}", remedy)
        for family, splits, remedy in (
            ("stamps", ("train", "val", "val_novel", "val_real"), _STAMPS),
            ("drawn", ("train", "val"), _DRAWN),
        )
        for split in splits
    },
    **{
        f"coco_2017_{split}": (
            f"coco/annotations/instances_{split}2017.json",
            f"coco/{split}2017",
            _COCO,
        )
        for split in ("train", "val")
    },
    "objects365_v1_train": (
        "objects365_v1/annotations/objects365_train.json",
        "objects365_v1/train",
        _O365,
    ),
    "v3det_train": ("v3det/annotations/v3det_2023_v1_train.json", "v3det", _V3DET),
    "gqa_train": ("gqa/final_mixed_train_no_coco_vg.jsonl", "gqa/images", _GOLDG),
    "flickr30k_train": (
        "flickr30k/final_flickr_separateGT_train_vg.jsonl",
        "flickr30k/flickr30k_images",
        _GOLDG,
    ),
}
# Published files are known to have a few boxes without a size; ours must not.
_OURS = ("stamps_", "drawn_")


def register_builtin(root: str | Path | None = None) -> None:
    """Registers the built-in names under `root` (default: `dataset_root()`), as an import does."""
    root = dataset_root() if root is None else Path(root)
    for name, (file, images, remedy) in _BUILTIN.items():
        if file.endswith(".jsonl"):
            register_odvg_jsonl(name, root / file, root / images, remedy=remedy)
        else:
            bad_boxes = "error" if name.startswith(_OURS) else "drop"
            register_coco_json(name, root / file, root / images, bad_boxes=bad_boxes, remedy=remedy)


register_builtin()
