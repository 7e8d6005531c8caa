"""Reading COCO JSON: images, annotations, categories."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode

from .boxes import FAULTS, BadBoxes, clip_box
from .catalog import Record, read_json, replace_metadata, require

logger = logging.getLogger(__name__)

LVIS_FIELDS = ("neg_category_ids", "not_exhaustive_category_ids")


def load_coco_json(
    json_file: str | Path,
    image_root: str | Path,
    name: str | None = None,
    *,
    bad_boxes: BadBoxes = "error",
    clean_names: bool = False,
    names: Mapping[int, str] | None = None,
    novel: bool = True,
    evaluator_type: str = "coco",
    remedy: str = "",
) -> list[Record]:
    """Reads and checks a COCO JSON file; returns one record per image, in the file's order.

    Sets the metadata of `name` (default: the path of the file, with which the mappers and
    `get_metadata` find it): ``thing_classes`` in the order of the category ids and, where the
    categories have these fields, ``frequency``, ``novel`` and ``near_synonyms`` (in the file: a
    list of category ids or names; here: contiguous ids, made symmetric).

    LVIS files are read too: an image without ``file_name`` lies where the end of its ``coco_url``
    says (``val2017/000000397133.jpg``), and records keep ``neg_category_ids`` and
    ``not_exhaustive_category_ids``, the ids of the file.

    clean_names  makes phrases of the category names, see `clean_name`
    names        other names for some categories, by the ids of the file (prompt overrides)
    novel        False: the flags "novel" don't count, all categories are trained

    A box that reaches over the border is clipped and counted in a warning. One that is not positive
    or lies fully outside raises, or is dropped and counted with ``bad_boxes="drop"``, which is
    meant for published files with known mistakes.

    Raises FileNotFoundError or ValueError naming the file, the field and the remedy.
    """
    json_file, image_root = Path(json_file), Path(image_root)
    name = str(json_file) if name is None else name
    content = read_json(json_file, remedy, "images", "annotations", "categories")
    categories = _check_categories(json_file, content["categories"])
    if clean_names:
        categories = [{**c, "name": clean_name(c["name"])} for c in categories]
    if not novel:
        categories = [{k: v for k, v in c.items() if k != "novel"} for c in categories]
    if names:
        categories = [{**c, "name": names.get(c["id"], c["name"])} for c in categories]
    contiguous = {category["id"]: i for i, category in enumerate(categories)}
    _set_metadata(name, json_file, image_root, categories, contiguous, evaluator_type)

    records: dict[Any, Record] = {}
    for i, image in enumerate(content["images"]):
        where = f"{json_file}: images[{i}]"
        require(where, image, "id", "width", "height")
        file_name = _file_name(where, image)
        if image["id"] in records:
            raise ValueError(
                f"{where}: image id {image['id']!r} occurs twice: give every image one"
            )
        if not (image["width"] > 0 and image["height"] > 0):
            raise ValueError(
                f"{where}: size {image['width']} x {image['height']} of {file_name!r}: "
                "write the size of the image in pixels"
            )
        records[image["id"]] = {
            "file_name": str(image_root / file_name),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "dataset_name": name,
            "annotations": [],
            **{key: image[key] for key in LVIS_FIELDS if key in image},
        }

    counts, seen = Counter(), set()
    for i, annotation in enumerate(content["annotations"]):
        where = f"{json_file}: annotations[{i}] (id {annotation.get('id')!r})"
        require(where, annotation, "image_id", "category_id", "bbox")
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
        box, fault = clip_box(annotation["bbox"], record["width"], record["height"])
        counts[fault] += 1
        if fault in ("malformed", "empty", "outside"):
            if bad_boxes == "drop":
                continue
            raise ValueError(
                f"{where}: bbox {annotation['bbox']} is {FAULTS[fault]} (image "
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


def clean_name(name: str) -> str:
    """The phrase of a category name: without what stands in brackets, with spaces for underscores,
    in lower case; "Bow_(weapon)" becomes "bow".

    That is the rule of GLIP (od_to_grounding.py, `clean_name`) and mmdetection, which repeated
    spaces and spaces at the ends survive there; the text encoders' tokenizers ignore them.
    """
    return " ".join(re.sub(r"\(.*?\)", "", name).replace("_", " ").lower().split()) or name


def _file_name(where: str, image: dict) -> str:
    if "file_name" not in image and isinstance(image.get("coco_url"), str):
        return "/".join(image["coco_url"].split("/")[-2:])
    require(where, image, "file_name")
    return image["file_name"]


def _check_categories(path: Path, categories: list) -> list[dict]:
    """The categories in the order of their ids."""
    if not categories:
        raise ValueError(f"{path}: 'categories' is empty: list every category with id and name")
    ids = set()
    for i, category in enumerate(categories):
        where = f"{path}: categories[{i}]"
        require(where, category, "id")
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
    name: str,
    json_file: Path,
    image_root: Path,
    categories: list[dict],
    contiguous: dict,
    evaluator_type: str,
) -> None:
    fields: dict[str, Any] = {
        "thing_classes": [category["name"].strip() for category in categories],
        "thing_dataset_id_to_contiguous_id": contiguous,
        "json_file": str(json_file),
        "image_root": str(image_root),
        "evaluator_type": evaluator_type,
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
    replace_metadata(name, **fields)


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
