"""Tiny data sets in the exact published formats and layouts, with drawn images.

``write_all(root)`` fills a folder that ``DETECTRON2_DATASETS`` may point to. The fields of each
file are those of the published one, also those that nothing reads.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from dynamic_dino.data.synthetic.drawn import NAMES, draw_image

SIZE = 96


class Pictures:
    """Draws pictures of coloured shapes into a folder."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def draw(self, path: Path) -> tuple[int, int, list[tuple[int, list[int]]]]:
        """(width, height, [(index into NAMES, [x, y, w, h])]), at least one object."""
        objects = []
        while not objects:
            picture, objects = draw_image(self.rng, SIZE)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        return picture.width, picture.height, objects


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def _first_image(name: str) -> int:
    """Sets that share COCO's folders get images of their own."""
    return zlib.crc32(name.encode()) % 500_000


def _detection(
    root: Path,
    pictures: Pictures,
    count: int,
    file: str,
    folder: str,
    image: Callable[[int, int, int], dict],
    categories: list[dict],
    annotation: dict | None = None,
    first_id: int = 1,
) -> Path:
    """A COCO file; `image` makes an image's entry of (number, width, height), `file_name` in it is
    relative to `folder`; category i is NAMES[i]."""
    images, annotations = [], []
    for number in range(count):
        entry = image(number, 0, 0)
        name = entry.get("file_name") or "/".join(entry["coco_url"].split("/")[-2:])
        width, height, objects = pictures.draw(root / folder / name)
        images.append(image(number, width, height))
        for label, box in objects:
            annotations.append(
                {
                    "id": len(annotations) + first_id,
                    "image_id": entry["id"],
                    "category_id": categories[label]["id"],
                    "bbox": [float(v) for v in box],
                    "area": float(box[2] * box[3]),
                    **(annotation or {}),
                }
            )
    content = {"images": images, "annotations": annotations, "categories": categories}
    return write_json(root / file, content)


def write_objects365(root: Path, rng: np.random.Generator, count: int = 4) -> Path:
    return _detection(
        root,
        Pictures(rng),
        count,
        "objects365_v1/annotations/objects365_train.json",
        "objects365_v1/train",
        lambda n, w, h: {
            "width": w,
            "height": h,
            "file_name": f"obj365_train_{n + 255476:012d}.jpg",
            "id": n + 255476,
        },
        [{"id": i, "name": name} for i, name in enumerate(NAMES, start=1)],
        {"iscrowd": 0},
        first_id=0,
    )


def write_v3det(root: Path, rng: np.random.Generator, count: int = 4) -> Path:
    categories = [
        {
            "id": i,
            "name": name.replace(" ", "_"),
            "cat_info": f"a {name}",
            "cat_info_gpt": f"It is a {name}.",
            "novel": i % 2 == 0,
        }
        for i, name in enumerate(NAMES, start=1)
    ]
    return _detection(
        root,
        Pictures(rng),
        count,
        "v3det/annotations/v3det_2023_v1_train.json",
        "v3det",
        lambda n, w, h: {
            "id": n + 1,
            "file_name": f"images/a{n:08d}/{n}_0123456789_abcdef.jpg",
            "height": h,
            "width": w,
        },
        categories,
        {"iscrowd": 0},
    )


def write_coco(root: Path, rng: np.random.Generator, split: str = "train", count: int = 4) -> Path:
    return _detection(
        root,
        Pictures(rng),
        count,
        f"coco/annotations/instances_{split}2017.json",
        f"coco/{split}2017",
        lambda n, w, h: {
            "license": 3,
            "file_name": f"{n + 9:012d}.jpg",
            "coco_url": f"http://images.cocodataset.org/{split}2017/{n + 9:012d}.jpg",
            "height": h,
            "width": w,
            "date_captured": "2013-11-14 11:18:45",
            "flickr_url": "http://farm1.staticflickr.com/1/1_a_z.jpg",
            "id": n + 9,
        },
        [
            {"supercategory": "shape", "id": 3 * i, "name": name}
            for i, name in enumerate(NAMES, start=1)
        ],
        {"iscrowd": 0, "segmentation": [[1.0, 1.0, 9.0, 1.0, 9.0, 9.0]]},
    )


def write_lvis(
    root: Path, rng: np.random.Generator, file: str = "lvis/lvis_v1_val.json", count: int = 4
) -> Path:
    """Images of train2017 and val2017 in turn, without file names, as LVIS v1 publishes them."""

    first = _first_image(file)

    def image(n: int, w: int, h: int) -> dict:
        folder = ("train2017", "val2017")[n % 2]
        return {
            "date_captured": "2013-11-14 17:02:52",
            "neg_category_ids": [3, 8],
            "license": 4,
            "height": h,
            "width": w,
            "flickr_url": "http://farm8.staticflickr.com/1/1_a_z.jpg",
            "coco_url": f"http://images.cocodataset.org/{folder}/{first + n:012d}.jpg",
            "id": first + n,
            "not_exhaustive_category_ids": [4],
        }

    categories = [
        {
            "image_count": 1,
            "synonyms": [name.replace(" ", "_")],
            "def": f"a {name}",
            "id": i,
            "synset": f"{name.replace(' ', '_')}.n.01",
            "name": f"{name.split()[0].title()}_{name.split()[1]}_(drawn_shape)",
            "frequency": "rcf"[i % 3],
            "instance_count": 2,
        }
        for i, name in enumerate(NAMES, start=1)
    ]
    annotation = {"segmentation": [[1.0, 1.0, 9.0, 1.0, 9.0, 9.0]]}
    return _detection(root, Pictures(rng), count, file, "coco", image, categories, annotation)


def write_odinw(
    root: Path,
    rng: np.random.Generator,
    folder: str = "odinw/CottontailRabbits/valid",
    names: tuple[str, ...] = ("Cottontail-Rabbit",),
    count: int = 3,
) -> Path:
    """Every object is of one of `names`, in turn; Roboflow's export fields."""
    path = _detection(
        root,
        Pictures(rng),
        count,
        f"{folder}/annotations_without_background.json",
        folder,
        lambda n, w, h: {
            "id": n,
            "license": 1,
            "file_name": f"IMG_{n}_jpg.rf.0a1b2c3d.jpg",
            "height": h,
            "width": w,
            "date_captured": "2020-11-19T20:06:48+00:00",
        },
        [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(NAMES)],
        {"iscrowd": 0, "segmentation": []},
        first_id=0,
    )
    content = json.loads(path.read_text())
    content["categories"] = [
        {"id": i, "name": name, "supercategory": "animals"} for i, name in enumerate(names, 1)
    ]
    for i, annotation in enumerate(content["annotations"]):
        annotation["category_id"] = i % len(names) + 1
    return write_json(path, content)


def caption_of(objects: list[tuple[int, list[int]]]) -> tuple[str, list[list[int]]]:
    """A sentence that names every object, and where each one's phrase stands in it."""
    caption, spans = "There is", []
    for i, (label, _) in enumerate(objects):
        caption += " and a " if i else " a "
        spans.append([len(caption), len(caption) + len(NAMES[label])])
        caption += NAMES[label]
    return caption + " on a plain ground.", spans


def _mdetr(
    root: Path,
    pictures: Pictures,
    count: int,
    file: str,
    folder: str,
    image: Callable[[int], dict],
    text_sizes: bool = False,
) -> Path:
    images, annotations = [], []
    for number in range(count):
        entry = image(number)
        width, height, objects = pictures.draw(root / folder / entry["file_name"])
        caption, spans = caption_of(objects)
        images.append(
            {
                "file_name": entry["file_name"],
                "height": str(height) if text_sizes else height,
                "width": str(width) if text_sizes else width,
                "id": number,
                "caption": caption,
                "tokens_negative": [[0, len(caption)]],
                **entry,
            }
        )
        for (_, box), span in zip(objects, spans, strict=True):
            annotations.append(
                {
                    "area": float(box[2] * box[3]),
                    "iscrowd": 0,
                    "image_id": number,
                    "category_id": 1,
                    "id": len(annotations),
                    "bbox": [float(v) for v in box],
                    "tokens_positive": [span],
                }
            )
    content = {
        "info": [],
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"supercategory": "object", "id": 1, "name": "object"}],
    }
    return write_json(root / file, content)


def write_gqa(root: Path, rng: np.random.Generator, count: int = 4) -> Path:
    return _mdetr(
        root,
        Pictures(rng),
        count,
        "mdetr_annotations/final_mixed_train_no_coco.json",
        "gqa/images",
        lambda n: {
            "file_name": f"{n + 2_370_799}.jpg",
            "dataset_name": "mixed",
            "data_source": "vg",
            "original_id": n + 2_370_799,
        },
    )


def write_flickr30k(root: Path, rng: np.random.Generator, count: int = 4) -> Path:
    return _mdetr(
        root,
        Pictures(rng),
        count,
        "mdetr_annotations/final_flickr_separateGT_train.json",
        "flickr30k/flickr30k_images",
        lambda n: {
            "file_name": f"{n + 3_359_636_318}.jpg",
            "dataset_name": "flickr",
            "sentence_id": 0,
            "original_img_id": n + 3_359_636_318,
            "tokens_positive_eval": [],
        },
        text_sizes=True,
    )


def write_refcoco(
    root: Path, rng: np.random.Generator, name: str = "refcoco", split: str = "val", count: int = 3
) -> Path:
    """One expression per object; the expressions of a picture share its file."""
    pictures, images, annotations = Pictures(rng), [], []
    first = _first_image(f"{name}_{split}")
    for number in range(count):
        file_name = f"COCO_train2014_{first + number:012d}.jpg"
        width, height, objects = pictures.draw(root / "coco/train2014" / file_name)
        for label, box in objects:
            color, shape = NAMES[label].split()
            caption = f"{shape} that is {color}"
            images.append(
                {
                    "file_name": file_name,
                    "height": height,
                    "width": width,
                    "id": len(images) + 1000,
                    "original_id": first + number,
                    "caption": caption,
                    "dataset_name": name,
                    "tokens_negative": [[0, len(caption)]],
                }
            )
            annotations.append(
                {
                    "area": float(box[2] * box[3]),
                    "iscrowd": 0,
                    "image_id": images[-1]["id"],
                    "category_id": 1,
                    "id": len(annotations),
                    "bbox": [float(v) for v in box],
                    "original_id": 1,
                    "tokens_positive": [[0, len(shape)]],
                }
            )
    content = {
        "info": {},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"supercategory": "person", "id": 1, "name": "person"}],
    }
    return write_json(root / f"mdetr_annotations/finetune_{name}_{split}.json", content)


def write_all(root: Path, seed: int) -> None:
    """The training sets, COCO val, LVIS val and minival, two of ODinW, and one split of each
    RefCOCO."""
    rng = np.random.default_rng(seed)
    for write in (write_objects365, write_v3det, write_gqa, write_flickr30k, write_coco):
        write(root, rng)
    write_coco(root, rng, "val")
    write_lvis(root, rng)
    write_lvis(root, rng, "coco/annotations/lvis_v1_minival_inserted_image_name.json")
    write_odinw(root, rng)
    write_odinw(root, rng, "odinw/Raccoon/Raccoon.v2-raw.coco/valid", ("raccoon",))
    for name, split in (("refcoco", "val"), ("refcoco+", "testB"), ("refcocog", "test")):
        write_refcoco(root, rng, name, split)
