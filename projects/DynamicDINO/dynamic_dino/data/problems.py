"""What can be wrong with a data set, and what is done about it.

Readers hand each `DataError` to a reporter. The default one raises, so that training meets one
clear error; `Dropped` lets boxes go that published files are known to get wrong; `python -m
dynamic_dino.data check` collects them all. When the reporter returns, the reader leaves out what
the problem is about.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

logger = logging.getLogger(__name__)

MAX_LENGTH = 1000  # characters of a message
BadBoxes = Literal["error", "drop"]


class Kind(NamedTuple):
    """A kind of problem, by whose name problems are counted.

    cause, remedy  what stands in docs/troubleshooting.md
    note           a detector can live with it: said, but no reason to refuse the data
    box            it concerns one box and its phrase, which a published file may have dropped
    """

    cause: str
    remedy: str
    note: bool = False
    box: bool = False


KINDS = {
    # the file
    "unreadable file": Kind(
        "It can't be opened, is in another encoding than UTF-8, is no valid JSON or XML, or ends "
        "in the middle; the message says which.",
        "Save it as UTF-8, correct the line, or export or download it again.",
    ),
    "missing field": Kind(
        "An item lacks a field, or has something else there: a number where a path is expected, an "
        "object where a list is.",
        "Write the field as [own data](data.md) describes it.",
    ),
    "bad id": Kind(
        "An id is neither a whole number nor text: true, 1.5, a list.",
        "Number images, annotations and categories with whole numbers.",
    ),
    "mixed ids": Kind(
        'Some ids are numbers and others are text: 1 and "2" are never equal.',
        "Write all of them in one way, numbers without quotes.",
    ),
    "duplicate id": Kind(
        "Two images, annotations or categories have one id, so that nothing can tell them apart; "
        "often two files were joined.",
        "Renumber one of them.",
    ),
    "bad flag": Kind(
        "A flag such as `iscrowd` is none of 0, 1, true, false, also as text.",
        "Write 0 or 1.",
    ),
    "wrong count": Kind(
        "No image at all, or not as many images and boxes as were published.",
        "Get the version that [data sets](../datasets/README.md) names.",
    ),
    "other number of texts": Kind(
        "Not as many different names or phrases as were published. How phrases were told apart "
        "wasn't; here those that differ in capitals or spaces only are one.",
        "Nothing, if the images and boxes agree; else see wrong count.",
        note=True,
    ),
    "failed check": Kind(
        "A check itself failed, for a reason that nobody thought of; the others were made.",
        "Report the line that is printed.",
    ),
    # images
    "missing image": Kind(
        "No file lies where the annotation says.",
        "Name the folder of the images (`--image-folder`, `data.train_images=`), add the file, or "
        "remove the annotation. See [pictures](#pictures).",
    ),
    "image found elsewhere": Kind(
        "No file lies where the annotation says, as in paths of Windows or of another machine, but "
        "the end of the path exists in the image folder, or in a folder such as `images` in it or "
        "beside it. All images of that folder are read from there.",
        "None is needed; `convert` writes the paths as they are found.",
        note=True,
    ),
    "bad image": Kind(
        "The picture can't be decoded, or is of another size than the annotation says.",
        "Replace the file, or correct the size. See [pictures](#pictures).",
    ),
    "turned image": Kind(
        "It was turned in the annotation tool, the file wasn't.",
        "Turn the file itself and export again.",
    ),
    "image without a size": Kind(
        "`width` or `height` isn't a positive whole number of pixels.",
        "Write the size of the image.",
    ),
    "ambiguous image": Kind(
        "Several files may be meant.",
        "Name the folder of the images, or write the path with its folders.",
    ),
    "duplicate image": Kind(
        "One picture is annotated in two files.", "Remove one of them, or join them by hand."
    ),
    "image under two ids": Kind(
        "Two records have one picture: what is annotated in the one is background in the other.",
        "Join their annotations under one id.",
        note=True,
    ),
    "missing annotation": Kind(
        "A list names an image that no annotation file belongs to.",
        "Add the annotation, or remove the name from the list.",
    ),
    "unknown image": Kind(
        "An annotation is of an `image_id` that the file's images don't have.",
        "Add the image, remove the annotation, or write both ids in one way.",
    ),
    # boxes
    "malformed box": Kind(
        "A `bbox` isn't four finite numbers: null, NaN, three of them, words.",
        "Correct or remove it.",
        box=True,
    ),
    "empty box": Kind(
        "It has no width or no height.",
        "Correct or remove it; a click leaves such boxes.",
        box=True,
    ),
    "box outside the image": Kind(
        "It doesn't touch the image.", "Correct it, or the size of the image.", box=True
    ),
    "box beyond the image": Kind(
        "It reaches far over the border, as the tracks of videos do.",
        "Cut it to the image, or remove it.",
        box=True,
    ),
    "mixed box conventions": Kind(
        "It fits the image only in the other convention, `[x1, y1, x2, y2]` in COCO JSON, `[x, y, "
        "width, height]` in ODVG: the file, or a part of it, was written so.",
        "Convert the boxes that were written so.",
        box=True,
    ),
    "boxes not in pixels": Kind(
        "All boxes lie within one pixel: they are parts of the image.",
        "Multiply by the image's width and height.",
    ),
    "boxes not in parts of the image": Kind(
        "YOLO's numbers are larger than 1: they are pixels.",
        "Divide by the image's width and height.",
    ),
    "only crowds": Kind(
        "Every box has `iscrowd` 1, as exports of masks write it (SAM, pycococreator): crowds are "
        "neither trained nor scored.",
        "Write `iscrowd` 0 where a box holds one object: `python -m dynamic_dino.data convert IN "
        "OUT --to coco --crowds-as-objects`.",
    ),
    "box from a polygon": Kind(
        "Annotations have no `bbox`, only a `segmentation`: the box around it is taken.",
        "Nothing, if `python -m dynamic_dino.data show` draws them right.",
        note=True,
    ),
    "box twice": Kind(
        "Two boxes are equal in image, name and corners: both are trained, one is always missed.",
        "Remove one of them.",
        note=True,
    ),
    # names
    "category without a name": Kind(
        "The name is missing, a number, or without a letter or digit.",
        "Write what it is in plain words: the detector reads it.",
    ),
    "unknown category": Kind(
        "An annotation has a `category_id` that the file's categories don't have.",
        "Add the category with its name, or remove the annotation.",
    ),
    "ambiguous names": Kind(
        "Two files name the classes differently.", "Keep the one that is right."
    ),
    "unclean name": Kind(
        "Underscores, brackets or doubled spaces: the text encoder reads them too.",
        "Write plain words: `traffic light`, not `traffic_light_(v2)`.",
        note=True,
    ),
    "duplicate name": Kind(
        "Two classes have one name, or names with the same tokens: BERT drops capitals, accents.",
        "Merge or rename them.",
        note=True,
    ),
    "unknown name": Kind(
        "The text encoder's vocabulary has none of its words: names in other scripts than its own "
        "are all the same to it.",
        "Translate it.",
        note=True,
    ),
    "name without a box": Kind(
        "Nothing is annotated with it: the name of a group, which exporters add, or one that this "
        "part of the data doesn't show. It is never asked for as absent while training, nor in "
        "evaluations of own data.",
        'Remove it, or ask for all names with `prompt_names="all"` of the `TestMapper`.',
        note=True,
    ),
    "unknown frequency": Kind(
        "`frequency` isn't `r`, `c` or `f`.", "Use these, or leave the field out."
    ),
    "unknown near-synonym": Kind(
        "`near_synonyms` has what is no category of the file.", "Use ids or names of categories."
    ),
    # captions
    "bad caption": Kind("The caption is no text.", "Write a sentence."),
    "phrase outside the caption": Kind(
        "A phrase doesn't occur in its caption, or `tokens_positive` reaches beyond it.",
        "Use words of the caption, or correct the characters.",
        box=True,
    ),
    "caption over the token limit": Kind(
        "The text encoder takes no more tokens; captions are never cut.",
        "Shorten or split it, or raise `model.text_encoder.max_tokens`.",
    ),
}
BOX_KINDS = tuple(name for name, kind in KINDS.items() if kind.box)
NOTES = tuple(name for name, kind in KINDS.items() if kind.note)


def table_of_kinds() -> str:
    """`KINDS` as the Markdown table of docs/troubleshooting.md."""
    rows = [
        f"| {name}{' (note)' if kind.note else ''} | {kind.cause} | {kind.remedy} |"
        for name, kind in KINDS.items()
    ]
    return "\n".join(["| `check` says | cause | remedy |", "|---|---|---|", *rows])


class DataError(Exception):
    """One thing that is wrong with a data set.

    Raised about an item by code that doesn't know where the item stands; the reader adds the place
    with `at` and hands it to its reporter.

    Args:
        kind: one of `KINDS`, by which problems are counted; your own readers may have others.
        what: what is wrong, and how to repair it.
        where: the file, and the place in it.
    """

    def __init__(self, kind: str, what: str, where: str = "") -> None:
        if len(what) > MAX_LENGTH:  # it may show a name or a caption of any length
            what = f"{what[: MAX_LENGTH - 300]} [...] {what[-300:]}"
        super().__init__(f"{where}: {what}" if where else what)
        self.kind, self.what, self.where = kind, what, where

    def at(self, where: str) -> DataError:
        return DataError(self.kind, self.what, where)


Reporter = Callable[[DataError], None]


def require_fields(item: Any, *fields: str) -> None:
    """Raises DataError for a field that the item lacks."""
    for field in fields:
        if not isinstance(item, dict) or item.get(field) is None:
            raise DataError("missing field", f"it has no {field!r}: add this field")


def refuse(problem: DataError) -> None:
    """The reporter that raises each problem as a ValueError."""
    raise ValueError(str(problem))


class Dropped:
    """Counts problems of single boxes, whose annotations are left out, and refuses all others."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, problem: DataError) -> None:
        if problem.kind not in BOX_KINDS:
            refuse(problem)
        self.counts[problem.kind] += 1

    def log(self, file: object) -> None:
        if self.counts:
            kinds = ", ".join(f"{kind}: {count}" for kind, count in self.counts.items())
            logger.warning("%s: dropped %d boxes (%s)", file, self.counts.total(), kinds)
