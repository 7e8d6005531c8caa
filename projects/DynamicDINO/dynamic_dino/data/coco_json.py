"""Reading COCO JSON: images, annotations, categories; and what else is laid out like it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .boxes import box_around, read_box, read_size
from .catalog import replace_metadata, require_file
from .columns import NO_ID, Columns
from .fields import (
    Id,
    brief,
    fits_int64,
    read_flag,
    read_id,
    read_list,
    read_name,
    read_number,
    read_path,
)
from .images import image_size
from .json_stream import stream_json
from .problems import BadBoxes, DataError, Dropped, Reporter, refuse, require_fields
from .records import Records
from .whereabouts import find_path

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
    sizes_of_images: bool = False,
    evaluator_type: str = "coco",
    remedy: str = "",
    report: Reporter | None = None,
) -> Records:
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
    sizes_of_images  the sizes are those of the image files as they are seen, not the file's
    report       what is done about problems instead of `bad_boxes`, see `problems`

    A box that reaches over the border is clipped and counted in a warning. One that is not
    positive, lies fully outside, or looks like [x1, y1, x2, y2] raises, or is dropped and counted
    with ``bad_boxes="drop"``, which is meant for published files with known mistakes.

    Raises FileNotFoundError or ValueError naming the file, the field and the remedy.
    """
    json_file, image_root = Path(json_file), Path(image_root)
    name = str(json_file) if name is None else name
    dropped = Dropped()
    report = report or (dropped if bad_boxes == "drop" else refuse)
    file = CocoFile(json_file, remedy, report, _read_image, read_category)
    categories = check_categories(str(json_file), file.categories, report)
    groups = group_names(categories, file.keys)
    notes = [f"left out the name {c['name']!r}, of a group without boxes" for c in groups]
    if file.outlined:
        notes.append(f"made {file.outlined:,} boxes from polygons or masks")
    categories = [category for category in categories if category not in groups]
    if clean_names:
        categories = [{**c, "name": clean_name(c["name"])} for c in categories]
    if not novel:
        categories = [{k: v for k, v in c.items() if k != "novel"} for c in categories]
    if names:
        categories = [{**c, "name": names.get(c["id"], c["name"])} for c in categories]
    contiguous = {category["id"]: i for i, category in enumerate(categories)}
    metadata = _metadata(json_file, image_root, categories, contiguous, report)

    class_of = np.array([contiguous.get(key, -1) for key in file.keys] + [-1])
    file.leave_out(
        class_of[file.columns.key] < 0,
        "unknown category",
        lambda i: _unknown_id(
            "category_id",
            file.keys[file.columns.key[i]],
            "categories",
            contiguous,
            "add the category with its name",
        ),
    )
    if sizes_of_images:
        file.take_sizes_of_images(image_root)
    file.fit()
    dropped.log(json_file)
    classes = class_of[file.columns.key]
    replace_metadata(
        name,
        **metadata,
        evaluator_type=evaluator_type,
        notes=notes,
        without_boxes=without_boxes(len(categories), classes),
        outlined=file.outlined,
    )
    return file.columns.records(name, image_root, classes)


def clean_name(name: str) -> str:
    """The phrase of a category name: without what stands in brackets, with spaces for underscores,
    in lower case; "Bow_(weapon)" becomes "bow".

    That is the rule of GLIP (od_to_grounding.py, `clean_name`) and mmdetection, in which repeated
    spaces and spaces at the ends survive; the text encoders' tokenizers ignore them.
    """
    return " ".join(re.sub(r"\(.*?\)", "", name).replace("_", " ").lower().split()) or name


def group_names(categories: Sequence[dict], used: Iterable[Hashable]) -> list[dict]:
    """The categories that stand for a group, not for things: Roboflow's exports begin with one that
    is the "supercategory" of others, has none itself and no box. `used`: ids that have boxes."""
    used = set(used)
    above = [(c["id"], c.get("supercategory")) for c in categories]
    return [
        c
        for c in categories
        if c.get("supercategory") == "none"
        and c["id"] not in used
        and any(name == c.get("name") and id != c["id"] for id, name in above)
    ]


class CocoFile:
    """What a COCO-like file says, read in one pass: `columns`, `categories`, and `keys`, of which
    ``columns.key`` holds the indices. Training, `check` and scoring read with it.

    outlined  how many boxes were made from polygons or masks, where there is no "bbox"
    further   what `read_further` gave for each annotation, in the file's order

    Args:
        source: the file, or its content.
        read_image: image -> file name, further fields of the record or None.
        read_key: annotation -> what tells classes apart, such as the category id.
        sized: False: images need no width and height, which become 0.
        read_further: annotation, area of its box -> what else of it is kept.

    All raise DataError for what is wrong; it is reported and left out.
    """

    LISTS = ("images", "annotations", "categories")

    def __init__(
        self,
        source: Path | dict,
        remedy: str,
        report: Reporter,
        read_image: Callable[[dict], tuple[str, dict | None]],
        read_key: Callable[[dict], Hashable],
        lists: Sequence[str] = LISTS,
        *,
        sized: bool = True,
        read_further: Callable[[dict, float], dict] | None = None,
    ) -> None:
        if isinstance(source, dict):
            self.path, items = "the ground truth", _items_of(source, lists)
        else:
            require_file(source, remedy)
            self.path, items = str(source), stream_json(source, lists)
        self.report = report
        self.read_image, self.read_key = read_image, read_key
        self.sized, self.read_further = sized, read_further
        self.outlined = 0
        self.further: list[dict] = []
        self.columns = Columns()
        self.categories: list[Any] = []
        # Annotations may come before their images, so ids are numbered as they appear.
        self._ids: dict[Any, int] = {}
        self._image_of: dict[int, int] = {}  # number of an id -> index of its image
        self._keys: dict[Hashable, int] = {}
        self._odd_ids: set[Id] = set()  # ids of annotations that no column holds
        add = {"images": self._add_image, "annotations": self._add_annotation}
        for section, index, item in items:
            if section == "categories":
                self.categories.append(item)
                continue
            try:
                add[section](index, item)
            except DataError as error:
                item_id = item.get("id") if isinstance(item, dict) else None
                report(error.at(f"{self.path}: {section}[{index}] (id {brief(item_id)})"))
        self.columns.close()
        self.keys = list(self._keys)
        self._find_images()
        self._find_repeated_ids()
        report_mixed_ids(self.columns.ids, "images", self.path, report)

    def place(self, i: int) -> str:
        """Where annotation i of the columns stands in the file."""
        number, id = int(self.columns.number[i]), int(self.columns.id[i])
        return f"{self.path}: annotations[{number}]" + (f" (id {id})" if id != NO_ID else "")

    def leave_out(self, bad: np.ndarray, kind: str, what: Callable[[int], str]) -> None:
        """Reports and drops annotations: bool [M]."""
        for i in np.flatnonzero(bad):
            self.report(DataError(kind, what(int(i)), self.place(i)))
        self.columns.select(~bad)

    def take_sizes_of_images(self, image_root: Path) -> None:
        """Whatever the file says, the sizes are those of the image files, turned as EXIF says."""
        names, sizes = self.columns.names, self.columns.sizes
        for i in tqdm(range(len(names)), desc="sizes of images", delay=1, disable=None):
            try:
                sizes[i] = image_size(find_path(names[i], image_root) or image_root / names[i])
            except (FileNotFoundError, ValueError) as error:
                self.report(DataError("bad image", str(error), str(self.path)))

    def fit(self) -> None:
        """Clips the boxes; reports and drops impossible ones."""

        def where(i: int) -> str:
            return f"{self.place(i)}, image {self.columns.names[self.columns.image[i]]!r}"

        self.columns.fit(self.path, "xywh", self.report, where)

    def _add_image(self, index: int, image: Any) -> None:
        require_fields(image, "id", *(("width", "height") if self.sized else ()))
        name, extra = self.read_image(image)
        size = read_size(image, name) if self.sized else (0, 0)
        image_id = read_id(image["id"], "id")
        number = self._ids.setdefault(image_id, len(self._ids))
        if number in self._image_of:
            raise DataError(
                "duplicate id",
                f"image id {image_id!r} occurs twice: give every image one of its own",
            )
        self._image_of[number] = self.columns.add_image(name, image_id, size, extra)

    def _add_annotation(self, index: int, annotation: Any) -> None:
        require_fields(annotation, "image_id")
        image_id = read_id(annotation["image_id"], "image_id")
        key, crowd = self.read_key(annotation), read_flag(annotation.get("iscrowd"), "iscrowd")
        box = self._read_box(annotation)
        own_id = NO_ID
        if annotation.get("id") is not None:
            own_id = read_id(annotation["id"], "id")
        if own_id != NO_ID and not fits_int64(own_id):
            if own_id in self._odd_ids:
                raise DataError("duplicate id", _TWICE)
            self._odd_ids.add(own_id)
            own_id = NO_ID
        read_flag(annotation.get("ignore"), "ignore")  # LVIS scores by it
        if self.read_further is not None:
            self.further.append(self.read_further(annotation, box[2] * box[3]))
        self.columns.add_annotation(
            self._ids.setdefault(image_id, len(self._ids)),
            self._keys.setdefault(key, len(self._keys)),
            index,
            box,
            crowd,
            own_id,
        )

    def _read_box(self, annotation: dict) -> tuple[float, float, float, float]:
        """Exports of polygons may have no "bbox": the box around them is taken."""
        if annotation.get("bbox") in (None, []):
            box = box_around(annotation.get("segmentation"))
            if box is not None:
                self.outlined += 1
                return box
        require_fields(annotation, "bbox")
        return read_box(annotation["bbox"], "xywh")

    def _find_images(self) -> None:
        """Numbers of image ids become indices of images."""
        numbers = self.columns.image
        index = np.full(len(self._ids) + 1, -1)
        for number, image in self._image_of.items():
            index[number] = image
        self.columns.image = index[numbers]
        bad = self.columns.image < 0
        if bad.any():
            ids = list(self._ids)
            known = {self.columns.ids[i] for i in self._image_of.values()}
            self.leave_out(
                bad,
                "unknown image",
                lambda i: _unknown_id(
                    "image_id", ids[numbers[i]], "images", known, "add the image"
                ),
            )

    def _find_repeated_ids(self) -> None:
        ids = self.columns.id
        order = np.argsort(ids, kind="stable")
        again = order[1:][(ids[order][1:] == ids[order][:-1]) & (ids[order][1:] != NO_ID)]
        bad = np.zeros(len(ids), dtype=bool)
        bad[again] = True
        self.leave_out(bad, "duplicate id", lambda i: _TWICE)


_TWICE = "this id occurs twice: give every annotation its own"


def _items_of(content: dict, lists: Sequence[str]) -> Iterator[tuple[str, int, Any]]:
    for key in lists:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"the ground truth has no list {key!r}: it must be as COCO JSON")
        yield from ((key, i, item) for i, item in enumerate(content[key]))


def _read_image(image: dict) -> tuple[str, dict | None]:
    if "file_name" not in image and isinstance(image.get("coco_url"), str):
        image = {**image, "file_name": "/".join(image["coco_url"].split("/")[-2:])}
    require_fields(image, "file_name")
    return read_path(image, "file_name"), read_federated(image) or None


def read_federated(image: dict) -> dict[str, list[Id]]:
    """The fields of LVIS that an image has."""
    return {
        field: [read_id(i, field) for i in read_list(image, field)]
        for field in LVIS_FIELDS
        if field in image
    }


def read_category(annotation: dict) -> Id:
    require_fields(annotation, "category_id")
    return read_id(annotation["category_id"], "category_id")


def _unknown_id(field: str, id: Id, section: str, known: Collection[Id], remedy: str) -> str:
    """What is wrong with an annotation's id that `section` lacks, or has as text or as a number."""
    what = f"{field} {id!r} is not among the file's {section}"
    other = str(id) if isinstance(id, int) else read_number(id)
    if other in known:
        return f"{what}, where {read_id(other, 'id')!r} is: write both with quotes or both without"
    return f"{what}: {remedy} or remove the annotation"


def report_mixed_ids(ids: Iterable[Id], what: str, path: str, report: Reporter) -> None:
    first = {isinstance(i, str): i for i in reversed(list(ids))}
    if len(first) > 1:
        report(
            DataError(
                "mixed ids",
                f"ids of {what} are numbers ({first[False]}) and text ({first[True]!r}): write all "
                "in one way, as numbers",
                path,
            )
        )


def check_categories(
    path: str, categories: list, report: Reporter, *, named: bool = True
) -> list[dict]:
    """The good categories in the order of their ids. `named`: each must have a name."""
    good: dict[Id, dict] = {}
    for i, category in enumerate(categories):
        try:
            require_fields(category, "id")
            category_id = read_id(category["id"], "id")
            category = {**category, "id": category_id}
            name = category.get("name")
            if named:
                read_name(name, f"category with id {category_id!r} has no name, but")
            if category_id in good:
                what = f"category id {category_id!r} occurs twice: renumber it"
                raise DataError("duplicate id", what)
            if category.get("frequency") not in ("r", "c", "f", None):
                raise DataError(
                    "unknown frequency",
                    f"category {name!r} has frequency {category['frequency']!r}: use 'r' (rare), "
                    "'c' (common), 'f' (frequent) or leave the field out",
                )
            if category.get("novel") is not None:
                category["novel"] = read_flag(category["novel"], "novel")
            good[category_id] = category
        except DataError as error:
            report(error.at(f"{path}: categories[{i}]"))
    if not categories:
        what = "'categories' is empty: list every category with id and name"
        report(DataError("missing field", what, path))
    report_mixed_ids(good, "categories", path, report)
    return sorted(good.values(), key=lambda c: (isinstance(c["id"], str), c["id"]))


def _metadata(
    path: Path, image_root: Path, categories: list[dict], contiguous: dict, report: Reporter
) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "thing_classes": [category["name"].strip() for category in categories],
        "thing_dataset_id_to_contiguous_id": contiguous,
        "json_file": str(path),
        "image_root": str(image_root),
    }
    if any("frequency" in category for category in categories):
        fields["frequency"] = [category.get("frequency") for category in categories]
    if any("novel" in category for category in categories):
        fields["novel"] = [bool(category.get("novel", False)) for category in categories]
    if any("near_synonyms" in category for category in categories):
        fields["near_synonyms"] = _near_synonyms(path, categories, contiguous, report)
    return fields


def _near_synonyms(
    path: Path, categories: list[dict], contiguous: dict, report: Reporter
) -> list[list[int]]:
    index = {category["name"]: i for i, category in enumerate(categories)} | contiguous
    related: list[set[int]] = [set() for _ in categories]
    for i, category in enumerate(categories):
        try:
            given = category.get("near_synonyms")
            for other in () if given is None else read_list(category, "near_synonyms"):
                j = index.get(read_id(other, "near_synonyms"))
                if j is None and isinstance(other, str):
                    continue  # a name of another split can't be a negative here
                if j is None:
                    raise DataError(
                        "unknown near-synonym",
                        f"near_synonyms of category {category['name']!r} has {other!r}, which is "
                        "not the id of a category of this file: use ids or names of categories",
                    )
                related[i].add(j)
                related[j].add(i)
        except DataError as error:
            report(error.at(f"{path}: category {category['name']!r}"))
    return [sorted(ids - {i}) for i, ids in enumerate(related)]


def without_boxes(count: int, classes: np.ndarray) -> list[int]:
    """Of `count` classes those that none of `classes`, int [M], is."""
    return np.setdiff1d(np.arange(count), classes).tolist()
