"""The table of data sets that have a name: their files, where they come from, what to expect.

Files are relative to ``DETECTRON2_DATASETS``. Where the literature has more than one layout or
format, the first place that exists is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .odinw import ODINW35, PROMPTS, files_of, splits_of

Format = Literal["coco", "mdetr", "odvg", "voc", "yolo", "labelme", "cvat", "labelstudio", "csv"]


@dataclass(frozen=True)
class Builtin:
    """A data set that has a name.

    files    (annotations, image folder), the usual place first
    page     where it is downloaded, or the command that makes it
    images   how many records it should have (grounding: captions), boxes: how many boxes; both up
             to `rounding`; None: not published
    texts    how many different names (grounding: phrases) it should have; as published, so in
             thousands where it is a multiple of them
    options  of the loader of the annotations' format
    """

    name: str
    format: Format
    files: tuple[tuple[str, str], ...]
    page: str
    licence: str
    images: int | None = None
    boxes: int | None = None
    rounding: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    texts: int | None = None

    def locate(self, root: Path) -> tuple[Path, Path]:
        """(annotations, image folder): of the first place that exists, else the usual one."""
        places = [(root / file, root / images) for file, images in self.files]
        return next((place for place in places if place[0].is_file()), places[0])

    def format_of(self, file: Path) -> Format:
        """Grounding data may lie in MDETR's format or, with "_vg" in the name, in ODVG."""
        return "odvg" if "_vg" in file.name or file.suffix == ".jsonl" else self.format

    @property
    def remedy(self) -> str:
        if self.page.startswith("python "):
            return f"make it with `{self.page}`"
        return f"download it from {self.page} and unpack it there"


# as published by MDETR and GLIP; in ODVG, by `python -m dynamic_dino.data convert` or mmdetection
GROUNDING_ENDINGS = (".json", "_vg.jsonl", "_vg.json")
PUBLISHED = {"bad_boxes": "drop", "clean_names": True}  # a few boxes without a size are known
COCO_PAGE = "https://cocodataset.org/#download"
COCO_LICENCE = "annotations CC-BY 4.0; images under their Flickr licences"
MDETR_PAGE = "https://github.com/ashkamath/mdetr/blob/main/.github/pretrain.md"
LVIS_PAGE = "https://www.lvisdataset.org/dataset"
GLIP_PAGE = "https://huggingface.co/GLIPModel/GLIP/tree/main"


def _ours() -> list[Builtin]:
    licences = {
        "stamps": "GPL-2 (tuxpaint-stamps) and per-photo licences (gcompris-qt)",
        "drawn": "Apache-2.0",
        "glyphs": "Apache-2.0",
    }
    return [
        Builtin(
            f"{family}_{split}",
            "coco",
            ((f"{family}/annotations/{split}.json", f"{family}/{pictures}"),),
            f"python -m dynamic_dino.data.synthetic.{family}",
            licences[family],
        )
        for family, splits in (
            ("stamps", ("train", "val", "val_novel", "val_real")),
            ("drawn", ("train", "val")),
            ("glyphs", ("train", "val", "described_train", "described_val")),
        )
        for split in splits
        for pictures in [split.removeprefix("described_")]
    ]


@dataclass(frozen=True)
class PhotoSet:
    """Photos with boxes under photos/NAME. `images` and `boxes`: of train, of val."""

    page: str
    licence: str
    images: tuple[int, int]
    boxes: tuple[int, int] | None = None


PHOTO_SETS = {
    "coco": PhotoSet(COCO_PAGE, COCO_LICENCE, (493, 90)),
    "groceries": PhotoSet(
        "https://github.com/aleksandar-aleksandrov/groceries-object-detection-dataset",
        "as stated there",
        (2_000, 250),
        (4_714, 593),
    ),
    "airport_debris": PhotoSet(
        "https://github.com/FOD-UNOmaha/FOD-data",
        "as stated there",
        (1_392, 150),
        (1_409, 153),
    ),
    "animals25": PhotoSet(
        "https://github.com/Ansheel9/Multi-Class-Object-Detection-",
        "Apache-2.0; photos from the web",
        (1_153, 283),
        (1_403, 331),
    ),
}


def _photos() -> list[Builtin]:
    return [
        Builtin(
            f"photos_{name}_{split}",
            "coco",
            ((f"photos/{name}/{split}.json", f"photos/{name}/images"),),
            f"python -m dynamic_dino.data.photos --sets {name}",
            photos.licence,
            images=photos.images[i],
            boxes=photos.boxes[i] if photos.boxes else None,
        )
        for name, photos in PHOTO_SETS.items()
        for i, split in enumerate(("train", "val"))
    ]


def _training() -> list[Builtin]:
    """The paper's pre-training data; the numbers are those of its Table 7, in thousands."""
    return [
        Builtin(
            "objects365_v1_train",
            "coco",
            (
                ("objects365_v1/annotations/objects365_train.json", "objects365_v1/train"),
                ("objects365v1/annotations/objects365_train.json", "objects365v1/train"),
                ("objects365v1/objects365_train.json", "objects365v1/train"),
            ),
            "https://www.objects365.org",
            "annotations CC-BY 4.0; images under their Flickr licences",
            images=609_000,
            boxes=9_621_000,
            texts=365,
            rounding=1000,
            options=PUBLISHED,
        ),
        Builtin(
            "v3det_train",
            "coco",
            (("v3det/annotations/v3det_2023_v1_train.json", "v3det"),),
            "https://v3det.openxlab.org.cn",
            "annotations CC-BY 4.0; images under their own licences",
            images=184_000,
            boxes=1_233_000,
            texts=13_000,
            rounding=1000,
            options={**PUBLISHED, "novel": False},
        ),
        Builtin(
            "gqa_train",
            "mdetr",
            tuple(
                (f"{folder}/final_mixed_train_no_coco{ending}", "gqa/images")
                for ending in GROUNDING_ENDINGS
                for folder in ("mdetr_annotations", "gqa")
            ),
            f"{GLIP_PAGE}/mdetr_annotations",
            "annotations CC-BY 4.0 (Visual Genome, GQA); images under their Flickr licences",
            images=621_000,
            boxes=3_681_000,
            texts=387_000,
            rounding=1000,
            options={"bad_boxes": "drop"},
        ),
        Builtin(
            "flickr30k_train",
            "mdetr",
            tuple(
                (f"{folder}/final_flickr_separateGT_train{ending}", f"{images}/flickr30k_images")
                for ending in GROUNDING_ENDINGS
                for folder, images in (
                    ("mdetr_annotations", "flickr30k"),
                    ("flickr30k", "flickr30k"),
                    ("flickr30k_entities", "flickr30k_entities"),
                )
            ),
            MDETR_PAGE,
            "research only; images under their Flickr licences",
            images=149_000,
            boxes=641_000,
            texts=94_000,
            rounding=1000,
            options={"bad_boxes": "drop"},
        ),
    ]


def _coco() -> list[Builtin]:
    return [
        Builtin(
            f"coco_2017_{split}",
            "coco",
            ((f"coco/annotations/instances_{split}2017.json", f"coco/{split}2017"),),
            COCO_PAGE,
            COCO_LICENCE,
            images=images,
            boxes=boxes,
            options=PUBLISHED,
        )
        for split, images, boxes in (("train", 118_287, 860_001), ("val", 5_000, 36_781))
    ]


def _lvis() -> list[Builtin]:
    options = {**PUBLISHED, "evaluator_type": "lvis"}
    licence = f"CC-BY 4.0 with COCO's terms; {COCO_LICENCE}"
    return [
        Builtin(
            "lvis_v1_val",
            "coco",
            (("lvis/lvis_v1_val.json", "coco"), ("coco/annotations/lvis_v1_val.json", "coco")),
            LVIS_PAGE,
            licence,
            images=19_809,
            boxes=244_707,
            options=options,
        ),
        Builtin(
            "lvis_v1_minival",
            "coco",
            tuple(
                (f"{folder}/lvis_v1_minival{ending}.json", "coco")
                for folder in ("lvis", "coco/annotations")
                for ending in ("", "_inserted_image_name")
            ),
            GLIP_PAGE,
            licence,
            images=4_809,
            options=options,
        ),
    ]


def _refcoco() -> list[Builtin]:
    """Referring expressions, one record each. RefCOCO and RefCOCO+ as UNC splits them, RefCOCOg as
    UMD does."""
    return [
        Builtin(
            f"{name}_{split}",
            "mdetr",
            tuple(
                (f"{folder}/finetune_{name}_{split}.json", "coco/train2014")
                for folder in ("mdetr_annotations", "coco/mdetr_annotations")
            ),
            MDETR_PAGE,
            f"Apache-2.0 (refer); {COCO_LICENCE}",
            images=count,
            boxes=count,
            options={"whole_caption": True, "evaluator_type": "refexp"},
        )
        for name, splits in (
            ("refcoco", {"val": 10_834, "testA": 5_657, "testB": 5_095}),
            ("refcoco+", {"val": 10_758, "testA": 5_726, "testB": 4_889}),
            ("refcocog", {"val": 4_896, "test": 9_602}),
        )
        for split, count in splits.items()
    ]


def _odinw() -> list[Builtin]:
    """Each split under its names, and where GLIP has prompts for it, again with these."""
    return [
        Builtin(
            f"odinw_{name}_{split}{suffix}",
            "coco",
            tuple(files_of(name, split)),
            f"{GLIP_PAGE}/odinw_35",
            "of each set: see its README.dataset.txt",
            options={**PUBLISHED, **options},
        )
        for name in ODINW35
        for split in splits_of(name)
        for suffix, options in (
            ("", {}),
            *([("_prompts", {"names": PROMPTS[name]})] if name in PROMPTS else ()),
        )
    ]


BUILTIN: dict[str, Builtin] = {
    entry.name: entry
    for entries in (_ours(), _photos(), _training(), _coco(), _lvis(), _odinw(), _refcoco())
    for entry in entries
}
