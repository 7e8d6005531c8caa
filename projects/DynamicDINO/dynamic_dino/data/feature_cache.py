"""Features of a frozen backbone on disk, so that training on a CPU need not compute them again.

A cache is a folder: ``manifest.json`` says what the features are of (images, canvas, weights of
the backbone), ``<level>.npy`` holds float16 [rows, C, H, W], ``done.npy`` marks the rows that are
written, so that an interrupted build goes on where it stopped. nano at 320 pixels: 282 kB an image.

Flips. ``flips="mirror"`` mirrors the cached features when they are read. That is approximate: a
strided convolution of a mirrored image is not exactly the mirrored convolution. It is done only
where the cells of the grid land on cells again, that is, where the content's width is a multiple of
the coarsest stride; other images are not flipped. ``flips="store"`` also stores the features of
each mirrored image: exact, twice the space and time.

    python -m dynamic_dino.data.feature_cache --config-file CONFIG [key=value ...]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..files import write_text
from .datasets import dataset_root
from .images import read_image, resize_transform, to_tensor

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Extractor = Callable[[list[Tensor]], dict[str, Tensor]]
Flips = Literal["mirror", "store"]


class FeatureCache:
    """A finished cache. Raises FileNotFoundError if there is none in `root`, ValueError if it is
    unfinished."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        manifest = _read_manifest(self.root)
        done = np.load(self.root / "done.npy", mmap_mode="r")
        if not done.all():
            raise ValueError(
                f"the feature cache {str(self.root)!r} is unfinished ({int(done.sum())} of "
                f"{len(done)} rows): run the same caching command again, it goes on from there"
            )
        self.canvas: int = manifest["canvas"]
        self.flips: Flips = manifest["flips"]
        self.levels: dict[str, list[int]] = manifest["levels"]
        self.backbone: str = manifest["backbone"]
        self.rows = {name: i for i, name in enumerate(manifest["files"])}
        self.bytes: list[int] = manifest["bytes"]
        self.stride = max(-(-self.canvas // shape[-1]) for shape in self.levels.values())
        self._arrays: dict[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict:
        # a memory map would be pickled as a whole
        return {**self.__dict__, "_arrays": None}

    def check_backbone(self, backbone: nn.Module) -> None:
        """Raises ValueError if the features were computed with other weights."""
        if module_fingerprint(backbone) != self.backbone:
            raise ValueError(
                f"the features in {str(self.root)!r} were computed by a backbone with other "
                "weights: load that backbone or cache the features again"
            )

    def can_flip(self, content_width: int) -> bool:
        """Whether `load` can give mirrored features of an image that is so wide on the canvas."""
        return self.flips == "store" or content_width % self.stride == 0

    def load(self, record: Record, flip: bool = False) -> dict[str, Tensor]:
        """{level: float16 [C, H, W]} of the image on the square canvas, content at the top left.

        Raises KeyError if the image isn't in the cache, ValueError if its file has changed.
        """
        key = _key(record["file_name"])
        if key not in self.rows:
            raise KeyError(
                f"no features of {record['file_name']!r} in {str(self.root)!r}: was the cache "
                "made for another data set? Cache the features of this one"
            )
        row = self.rows[key]
        if _file_bytes(record["file_name"]) != self.bytes[row]:
            raise ValueError(
                f"image {record['file_name']!r} has changed since its features were cached in "
                f"{str(self.root)!r}: cache them again"
            )
        if self._arrays is None:
            self._arrays = {
                level: np.load(self.root / f"{level}.npy", mmap_mode="r") for level in self.levels
            }
        if self.flips == "store":
            row = 2 * row + int(flip)
        features = {
            level: torch.from_numpy(np.array(array[row])) for level, array in self._arrays.items()
        }
        if flip and self.flips == "mirror":
            width = resize_transform(record["height"], record["width"], self.canvas).new_w
            features = {level: self._mirror(x, width) for level, x in features.items()}
        return features

    def _mirror(self, x: Tensor, content_width: int) -> Tensor:
        """Turns the columns of the content around; the padding stays at the right."""
        columns = round(content_width * x.shape[-1] / self.canvas)
        return torch.cat([x[..., :columns].flip(-1), x[..., columns:]], dim=-1)


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
    records = list({_key(record["file_name"]): record for record in records}.values())
    if not records:
        raise ValueError("no images to cache features of: the data set is empty")
    identity = {
        "version": 1,
        "canvas": canvas,
        "flips": flips,
        "backbone": backbone,
        "files": [_key(record["file_name"]) for record in records],
        "bytes": [_file_bytes(record["file_name"]) for record in records],
    }
    images = _Images(records, canvas, flips)
    if overwrite or not (root / "manifest.json").exists():
        with torch.inference_mode():
            shapes = {level: list(x.shape[1:]) for level, x in extract([images[0]]).items()}
        _create(root, {**identity, "levels": shapes}, len(images))
    manifest = _read_manifest(root)
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
    from detectron2.config import instantiate

    from .loader import as_sources

    nodes = cfg.dataloader
    loaders = [*filter(None, [nodes.get("train")]), *nodes.get("test", {}).values()]
    wanted: dict[str, tuple[int, list[Record]]] = {}
    for loader in loaders:
        mapper = loader.mapper
        root = mapper.get("features")
        if root is None:
            continue
        root = root if isinstance(root, str) else root.root
        dataset = instantiate(loader.dataset)
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
        model = instantiate(cfg.model).to("cuda" if torch.cuda.is_available() else "cpu")
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


def module_fingerprint(module: nn.Module) -> str:
    """A hash of the names and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        data = value.detach().cpu().contiguous()
        digest.update(str((data.dtype, tuple(data.shape))).encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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


def _read_manifest(root: Path) -> dict:
    path = root / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no feature cache in {str(root)!r}: make it with `python -m "
            "dynamic_dino.data.feature_cache --config-file CONFIG`, or unset the mapper's features"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): delete the folder") from error


def _key(file_name: str | Path) -> str:
    """Relative to the root of the data sets where possible, so that the root may move."""
    path, base = Path(file_name).absolute(), dataset_root().absolute()
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()


def _file_bytes(file_name: str | Path) -> int:
    try:
        return os.stat(file_name).st_size
    except FileNotFoundError:
        raise FileNotFoundError(
            f"image {str(file_name)!r} does not exist: check the data set's image folder"
        ) from None


def main() -> None:
    from dynamic_dino.config import load_config

    parser = argparse.ArgumentParser(
        description="Caches the features of a config's frozen backbone on disk."
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--flips", choices=("mirror", "store"), default="mirror")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a cache of other features"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = vars(parser.parse_args())
    cfg = load_config(options.pop("config_file"), options.pop("overrides"))
    for cache in cache_features(cfg, **options):
        print(f"{cache.root}: features of {len(cache)} images")


if __name__ == "__main__":
    main()
