"""Reading COCO JSON: images, annotations, categories; and what else is laid out like it."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .boxes import read_box, read_size
from .catalog import replace_metadata, require_file
from .columns import NO_ID, Columns
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
    file = CocoFile(json_file, remedy, report, _read_image, _read_category)
    categories = _check_categories(json_file, file.categories, report)
    groups = group_names(categories, file.keys)
    notes = [f"left out the name {c['name']!r}, of a group without boxes" for c in groups]
    categories = [category for category in categories if category not in groups]
    if clean_names:
        categories = [{**c, "name": clean_name(c["name"])} for c in categories]
    if not novel:
        categories = [{k: v for k, v in c.items() if k != "novel"} for c in categories]
    if names:
        categories = [{**c, "name": names.get(c["id"], c["name"])} for c in categories]
    contiguous = {category["id"]: i for i, category in enumerate(categories)}
    metadata = _metadata(json_file, image_root, categories, contiguous, report)
    replace_metadata(name, **metadata, evaluator_type=evaluator_type, notes=notes)

    class_of = np.array([contiguous.get(key, -1) for key in file.keys] + [-1])
    file.leave_out(
        class_of[file.columns.key] < 0,
        "unknown category",
        lambda i: (
            f"category_id {file.keys[file.columns.key[i]]!r} is not among the file's categories: "
            "add the category with its name or remove the annotation"
        ),
    )
    if sizes_of_images:
        file.take_sizes_of_images(image_root)
    file.fit()
    dropped.log(json_file)
    return file.columns.records(name, image_root, class_of[file.columns.key])


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
    ``columns.key`` holds the indices.

    Args:
        read_image: image -> file name, further fields of the record or None.
        read_key: annotation -> what tells classes apart, such as the category id.

    Both raise DataError for what is wrong; it is reported and left out.
    """

    LISTS = ("images", "annotations", "categories")

    def __init__(
        self,
        path: Path,
        remedy: str,
        report: Reporter,
        read_image: Callable[[dict], tuple[str, dict | None]],
        read_key: Callable[[dict], Hashable],
        lists: Sequence[str] = LISTS,
    ) -> None:
        require_file(path, remedy)
        self.path, self.report = path, report
        self.read_image, self.read_key = read_image, read_key
        self.columns = Columns()
        self.categories: list[Any] = []
        # Annotations may come before their images, so ids are numbered as they appear.
        self._ids: dict[Any, int] = {}
        self._image_of: dict[int, int] = {}  # number of an id -> index of its image
        self._keys: dict[Hashable, int] = {}
        self._odd_ids: set[str] = set()  # ids of annotations that aren't integers
        add = {"images": self._add_image, "annotations": self._add_annotation}
        for section, index, item in stream_json(path, lists):
            if section == "categories":
                self.categories.append(item)
                continue
            try:
                add[section](index, item)
            except DataError as error:
                item_id = item.get("id") if isinstance(item, dict) else None
                report(error.at(f"{path}: {section}[{index}] (id {item_id!r})"))
        self.columns.close()
        self.keys = list(self._keys)
        self._find_images()
        self._find_repeated_ids()

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
        require_fields(image, "id", "width", "height")
        name, extra = self.read_image(image)
        size = read_size(image, name)
        _require_plain(image, "id")
        number = self._ids.setdefault(image["id"], len(self._ids))
        if number in self._image_of:
            raise DataError(
                "duplicate id",
                f"image id {image['id']!r} occurs twice: give every image one of its own",
            )
        self._image_of[number] = self.columns.add_image(name, image["id"], size, extra)

    def _add_annotation(self, index: int, annotation: Any) -> None:
        require_fields(annotation, "image_id", "bbox")
        _require_plain(annotation, "id", "image_id", "category_id")
        box, key = read_box(annotation["bbox"], "xywh"), self.read_key(annotation)
        own_id = annotation.get("id", NO_ID)
        if type(own_id) is not int:
            if own_id in self._odd_ids:
                raise DataError("duplicate id", _TWICE)
            self._odd_ids.add(own_id)
            own_id = NO_ID
        self.columns.add_annotation(
            self._ids.setdefault(annotation["image_id"], len(self._ids)),
            self._keys.setdefault(key, len(self._keys)),
            index,
            box,
            bool(annotation.get("iscrowd", 0)),
            own_id,
        )

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
            self.leave_out(
                bad,
                "unknown image",
                lambda i: (
                    f"image_id {ids[numbers[i]]!r} is not among the file's images: add the image "
                    "or remove the annotation"
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


def _read_image(image: dict) -> tuple[str, dict | None]:
    if "file_name" not in image and isinstance(image.get("coco_url"), str):
        name = "/".join(image["coco_url"].split("/")[-2:])
    else:
        require_fields(image, "file_name")
        name = image["file_name"]
        if not isinstance(name, str):
            raise DataError("missing field", f"'file_name' is {str(name)[:40]}: write a path")
    return name, {key: image[key] for key in LVIS_FIELDS if key in image} or None


def _require_plain(item: dict, *fields: str) -> None:
    """Raises DataError for an id that is no number or text."""
    for field in fields:
        if isinstance(item.get(field), list | dict):
            what = f"{field!r} is {str(item[field])[:40]}: write a number"
            raise DataError("missing field", what)


def _read_category(annotation: dict) -> Hashable:
    require_fields(annotation, "category_id")
    return annotation["category_id"]


def _check_categories(path: Path, categories: list, report: Reporter) -> list[dict]:
    """The good categories in the order of their ids."""
    good: dict[Any, dict] = {}
    for i, category in enumerate(categories):
        try:
            require_fields(category, "id")
            _require_plain(category, "id")
            name = category.get("name")
            if not isinstance(name, str) or not re.search(r"\w", name):
                raise DataError(
                    "category without a name",
                    f"category with id {category['id']!r} has no name (got {name!r}): the name is "
                    "the phrase that the detector reads; write one in plain words",
                )
            if category["id"] in good:
                what = f"category id {category['id']!r} occurs twice: renumber it"
                raise DataError("duplicate id", what)
            if category.get("frequency") not in ("r", "c", "f", None):
                raise DataError(
                    "unknown frequency",
                    f"category {name!r} has frequency {category['frequency']!r}: use 'r' (rare), "
                    "'c' (common), 'f' (frequent) or leave the field out",
                )
            good[category["id"]] = category
        except DataError as error:
            report(error.at(f"{path}: categories[{i}]"))
    if not categories:
        what = "'categories' is empty: list every category with id and name"
        report(DataError("missing field", what, str(path)))
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
    by_name = {category["name"]: i for i, category in enumerate(categories)}
    related: list[set[int]] = [set() for _ in categories]
    for i, category in enumerate(categories):
        for other in category.get("near_synonyms") or ():
            if isinstance(other, str) and other not in by_name:
                continue  # a name of another split can't be a negative here
            j = by_name[other] if isinstance(other, str) else contiguous.get(other)
            if j is None:
                what = (
                    f"near_synonyms of category {category['name']!r} has {other!r}, which is not "
                    "the id of a category of this file: use ids or names of categories"
                )
                report(DataError("unknown near-synonym", what, str(path)))
                continue
            related[i].add(j)
            related[j].add(i)
    return [sorted(ids - {i}) for i, ids in enumerate(related)]
