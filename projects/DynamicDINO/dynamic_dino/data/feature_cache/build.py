"""Computing the features of all images and writing them down; an interrupted build goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ...config import build
from ...files import write_text
from ..images import read_image, resize_transform, to_tensor
from ..loader import as_sources
from .cache import (
    FeatureCache,
    Flips,
    Record,
    features_folder,
    file_bytes,
    image_key,
    module_fingerprint,
    read_manifest,
)

Extractor = Callable[[list[Tensor]], dict[str, Tensor]]


def build_feature_cache(
    extract: Extractor,
    records: Sequence[Record],
    root: str | Path,
    *,
    canvas: int,
    backbone: str = "",
    flips: Flips = "mirror",
    batch_size: int = 16,
    num_workers: int = 0,
    overwrite: bool = False,
) -> FeatureCache:
    """Computes and stores the features of every image; goes on with an unfinished cache.

    extract   images, uint8 [3, h, w] with longest edge `canvas`, to {level: [B, C, H, W]}: pads to
              the square canvas and normalises
    backbone  fingerprint of the weights behind `extract`, see `module_fingerprint`

    Raises ValueError if `root` holds a cache of something else, unless `overwrite`, or if a feature
    is not finite in float16.
    """
    root = Path(root)
    if flips not in ("mirror", "store"):
        raise ValueError(f"flips={flips!r}: use 'mirror' or 'store'")
    # the same image may come in several data sets
    records = list({image_key(record["file_name"]): record for record in records}.values())
    if not records:
        raise ValueError("no images to cache features of: the data set is empty")
    identity = {
        "version": 1,
        "canvas": canvas,
        "flips": flips,
        "backbone": backbone,
        "files": [image_key(record["file_name"]) for record in records],
        "bytes": [file_bytes(record["file_name"]) for record in records],
    }
    images = _Images(records, canvas, flips)
    if overwrite or not (root / "manifest.json").exists():
        with torch.inference_mode():
            shapes = {level: list(x.shape[1:]) for level, x in extract([images[0]]).items()}
        _create(root, {**identity, "levels": shapes}, len(images))
    manifest = read_manifest(root)
    for field, value in identity.items():
        if manifest[field] != value:
            raise ValueError(
                f"{str(root)!r} holds features of something else ({field!r} differs): give another "
                "folder, or overwrite=True to make them anew"
            )

    done = np.load(root / "done.npy", mmap_mode="r+")
    arrays = {level: np.load(root / f"{level}.npy", mmap_mode="r+") for level in manifest["levels"]}
    todo = np.flatnonzero(~done).tolist()
    batches = [todo[i : i + batch_size] for i in range(0, len(todo), batch_size)]
    loader = DataLoader(images, batch_sampler=batches, num_workers=num_workers, collate_fn=list)
    progress = tqdm(total=len(images), initial=len(images) - len(todo), desc="features", unit="img")
    written: list[int] = []
    for number, (rows, batch) in enumerate(zip(batches, loader, strict=True), start=1):
        with torch.inference_mode():
            features = extract(batch)
        for level, x in features.items():
            half = x.to(torch.float16).cpu()
            if not torch.isfinite(half).all():
                files = [images.file_name(row) for row in rows]
                raise ValueError(
                    f"level {level!r} has features that are not finite in float16, in the batch "
                    f"{files}: this backbone can't be cached"
                )
            arrays[level][rows] = half.numpy()
        written += rows
        if number % 50 == 0 or number == len(batches):
            for array in arrays.values():
                array.flush()
            done[written] = True  # only once their features are on the disk
            done.flush()
            written = []
        progress.update(len(rows))
    progress.close()
    return FeatureCache(root)


def cache_features(cfg: Any, model: nn.Module | None = None, **options: Any) -> list[FeatureCache]:
    """Caches the features that a config's loaders ask for: every loader whose mapper has
    ``features`` set to a folder. `options` go to `build_feature_cache`."""
    nodes = cfg.dataloader
    loaders = {f"dataloader.test.{name}": node for name, node in nodes.get("test", {}).items()}
    if nodes.get("train"):
        loaders = {"dataloader.train": nodes.train, **loaders}
    wanted: dict[str, tuple[int, list[Record]]] = {}
    for key, loader in loaders.items():
        mapper = loader.mapper
        root = features_folder(loader)
        if root is None:
            continue
        dataset = build(loader.dataset, f"{key}.dataset")
        records = [record for source in as_sources(dataset) for record in source]
        size, collected = wanted.setdefault(root, (mapper.size, []))
        if size != mapper.size:
            raise ValueError(f"{root!r} is asked for at sizes {size}, {mapper.size}")
        collected.extend(records)
    if not wanted:
        raise ValueError(
            "no mapper of this config has features: set dataloader.train.mapper.features="
            "FOLDER to say where to cache them"
        )
    if model is None:
        model = build(cfg.model, "model").to("cuda" if torch.cuda.is_available() else "cpu")
    model.eval()
    fingerprint = module_fingerprint(model.backbone)
    for root, (size, _) in wanted.items():
        if getattr(model, "canvas", size) != size:
            raise ValueError(
                f"model.canvas is {model.canvas}, but the mapper that reads {root!r} has size "
                f"{size}: features are cached on the canvas, so make them equal"
            )
    return [
        build_feature_cache(
            model.extract_features, records, root, canvas=size, backbone=fingerprint, **options
        )
        for root, (size, records) in wanted.items()
    ]


class _Images(Dataset):
    """Rows of the cache as resized images: uint8 [3, h, w]."""

    def __init__(self, records: list[Record], canvas: int, flips: Flips) -> None:
        self.records, self.canvas = records, canvas
        self.variants = 2 if flips == "store" else 1

    def __len__(self) -> int:
        return self.variants * len(self.records)

    def file_name(self, row: int) -> str:
        return self.records[row // self.variants]["file_name"]

    def __getitem__(self, row: int) -> Tensor:
        image = read_image(self.records[row // self.variants])
        image = resize_transform(*image.shape[:2], self.canvas).apply_image(image)
        return to_tensor(image[:, ::-1] if row % self.variants else image)


def _create(root: Path, manifest: dict, rows: int) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / "manifest.json").unlink(missing_ok=True)  # invalid until all is in place
        for level, shape in manifest["levels"].items():
            np.lib.format.open_memmap(
                root / f"{level}.npy", mode="w+", dtype=np.float16, shape=(rows, *shape)
            )
        np.save(root / "done.npy", np.zeros(rows, dtype=bool))
        write_text(root / "manifest.json", json.dumps(manifest))
    except OSError as error:
        raise OSError(
            f"can't write the feature cache {str(root)!r} ({error}): give a folder with write "
            "access and enough space"
        ) from error
