"""Objects cut out of photos and drawings by their boxes, as the features of a frozen encoder.

A domain is a data set: each folder of photos/ of the data root, and Stamps. Two sets that have a
name in common show it differently: web photos, everyday scenes, a workbench, tarmac, clip art.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import instantiate
from dynamic_dino.config import load_config
from dynamic_dino.data.coco_json import load_coco_json
from dynamic_dino.data.datasets import get_metadata
from dynamic_dino.data.feature_cache import module_fingerprint
from dynamic_dino.data.images import load_image
from dynamic_dino.modeling.preprocess import padded_images
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lib.detectors import ROOT

RECIPE = "configs/pretrain/nano_photos.py"  # whose encoder it is
STAMPS = ("train", "val", "val_novel")  # val_real has photos
MEAN = torch.tensor((123.675, 116.28, 103.53)).view(3, 1, 1)  # as the detectors have them
STD = torch.tensor((58.395, 57.12, 57.375)).view(3, 1, 1)
SMALL = 32 * 32  # pixels: a small object, as COCO has it


class Crop(NamedTuple):
    """An object: its domain and name, its image below the data root, and its box (x0, y0, x1, y1)
    in pixels."""

    domain: str
    name: str
    image: str
    box: tuple[int, int, int, int]


def read_crops(root: Path) -> list[Crop]:
    """The objects of all sets that are there, but for COCO's small ones and for crowds.

    Raises:
        FileNotFoundError: there are no sets.
    """
    files = [
        (folder.name, folder / f"{part}.json", folder / "images")
        for folder in sorted((root / "photos").glob("*"))
        for part in ("train", "val")
    ]
    stamps = root / "stamps"
    files += [("stamps", stamps / f"annotations/{part}.json", stamps / part) for part in STAMPS]
    files = [entry for entry in files if entry[1].is_file()]
    if not files:
        raise FileNotFoundError(
            f"no photos/*/train.json and no stamps/ in {root}: bring them with `python -m "
            "dynamic_dino.data.photos` and `python -m dynamic_dino.data.synthetic.stamps`, or set "
            "DETECTRON2_DATASETS to the folder that has them"
        )
    crops = []
    for domain, file, images in files:
        names = None
        for record in load_coco_json(file, images, bad_boxes="drop"):
            names = names or get_metadata(str(file)).thing_classes
            image = str(Path(record["file_name"]).relative_to(root))
            for a in record["annotations"]:
                x, y, w, h = a["bbox"]
                if w * h >= SMALL and not a["iscrowd"]:
                    box = (round(x), round(y), round(x + w), round(y + h))
                    crops.append(Crop(domain, names[a["category_id"]], image, box))
    return crops


def shared_names(
    crops: Iterable[Crop], domains: int = 3, names: int = 3, objects: int = 10
) -> dict[str, dict[str, int]]:
    """The domains to generalise over, and how many objects of each shared name they have.

    A name stays if at least so many `domains` have so many `objects` of it, a domain if it has at
    least so many of these `names`; what is left is looked at again until all of it stays.

    Raises:
        ValueError: nothing stays.
    """
    counts: dict[str, dict[str, int]] = {}
    for (domain, name), count in sorted(Counter((c.domain, c.name) for c in crops).items()):
        if count >= objects:
            counts.setdefault(domain, {})[name] = count
    while True:
        having = Counter(name for found in counts.values() for name in found)
        kept = {
            domain: {name: n for name, n in found.items() if having[name] >= domains}
            for domain, found in counts.items()
        }
        kept = {domain: found for domain, found in kept.items() if len(found) >= names}
        if kept == counts:
            break
        counts = kept
    if not counts:
        raise ValueError(
            f"no {domains} sets have {objects} objects of {names} names in common: more sets are "
            "needed in photos/ of the data root, or Stamps"
        )
    return counts


def at_most(crops: Sequence[Crop], most: int) -> list[Crop]:
    """Of each name of a domain `most` at most, the same ones each time."""
    order = random.Random(0).sample(crops, len(crops))
    seen: Counter[tuple[str, str]] = Counter()
    kept = []
    for crop in order:
        seen[crop.domain, crop.name] += 1
        if seen[crop.domain, crop.name] <= most:
            kept.append(crop)
    return sorted(kept)


def grid_features(crops: Sequence[Crop], root: Path, size: int, folder: Path) -> Tensor:
    """What nano's frozen EfficientNet-lite0 says of each crop, resized to a square of `size`
    pixels, in cells of 32: float16 [N, cells, C]. Kept in `folder`, and read from there."""
    config = load_config(ROOT / RECIPE).model
    backbone = instantiate(config.backbone).eval()
    known = [module_fingerprint(backbone), size, crops]
    known.append({c.image: (root / c.image).stat().st_size for c in crops})
    file = folder / f"{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]}.pt"
    if file.is_file():
        return torch.load(file)
    rows = sorted(range(len(crops)), key=lambda i: crops[i].image)
    found: list[Tensor] = []
    with torch.inference_mode():
        progress = tqdm(total=len(rows), desc="features", unit="crop")
        for images in batched(squares([crops[i] for i in rows], root, size), 32):
            maps = backbone(padded_images(images, (size, size), MEAN, STD))
            found.append(maps["p5"].flatten(2).transpose(1, 2).half())
            progress.update(len(images))
    features = torch.empty(len(rows), *found[0].shape[1:], dtype=torch.half)
    features[torch.tensor(rows)] = torch.cat(found)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(features, file)
    return features


def squares(crops: Iterable[Crop], root: Path, size: int) -> Iterator[Tensor]:
    """Each crop as uint8 [3, size, size]; neighbours of one image read it once."""
    for image, group in groupby(crops, key=lambda crop: crop.image):
        picture = Image.fromarray(load_image(root / image))
        for crop in group:
            square = picture.crop(crop.box).resize((size, size), Image.Resampling.BILINEAR)
            yield torch.from_numpy(np.array(square)).permute(2, 0, 1)


def batched(items: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    batch: list[Tensor] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
