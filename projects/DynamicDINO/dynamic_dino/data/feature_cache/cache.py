"""Reading cached features, and refusing those of another backbone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..datasets import dataset_root
from ..images import resize_transform
from ..whereabouts import why_missing

Record = dict[str, Any]
Flips = Literal["mirror", "store"]


class FeatureCache:
    """A finished cache. Raises FileNotFoundError if there is none in `root`, ValueError if it is
    unfinished."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        manifest = read_manifest(self.root)
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

    def check_backbone(self, fingerprint: str) -> None:
        """Raises ValueError unless a backbone of this `module_fingerprint` made the features."""
        if fingerprint != self.backbone:
            raise ValueError(
                f"the features in {str(self.root)!r} were computed by a backbone with other "
                "weights than this model's: load that backbone, cache the features again (python "
                "-m dynamic_dino.data.feature_cache --overwrite ...), or unset mapper.features"
            )

    def can_flip(self, content_width: int) -> bool:
        """Whether `load` can give mirrored features of an image that is so wide on the canvas."""
        return self.flips == "store" or content_width % self.stride == 0

    def load(self, record: Record, flip: bool = False) -> dict[str, Tensor]:
        """{level: float16 [C, H, W]} of the image on the square canvas, content at the top left.

        Raises KeyError if the image isn't in the cache, ValueError if its file has changed.
        """
        key = image_key(record["file_name"])
        if key not in self.rows:
            raise KeyError(
                f"no features of {record['file_name']!r} in {str(self.root)!r}: was the cache "
                "made for another data set? Cache the features of this one"
            )
        row = self.rows[key]
        if file_bytes(record["file_name"]) != self.bytes[row]:
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


def features_folder(loader: Mapping) -> str | None:
    """The cache that the mapper of a loader's config node reads, if it reads one."""
    features = (loader.get("mapper") or {}).get("features")
    return features if features is None or isinstance(features, str) else features.root


def check_feature_caches(loaders: Iterable[Mapping], model: nn.Module) -> None:
    """Raises ValueError if a loader (its config node) reads features of another backbone than that
    of `model`, FileNotFoundError if there is no cache where it reads them."""
    folders = dict.fromkeys(filter(None, map(features_folder, loaders)))
    if folders:
        fingerprint = module_fingerprint(model.backbone)
        for folder in folders:
            FeatureCache(folder).check_backbone(fingerprint)


def module_fingerprint(module: nn.Module) -> str:
    """A hash of the names and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        data = value.detach().cpu().contiguous()
        digest.update(str((data.dtype, tuple(data.shape))).encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_manifest(root: Path) -> dict:
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


def image_key(file_name: str | Path) -> str:
    """Relative to the root of the data sets where possible, so that the root may move."""
    path, base = Path(file_name).absolute(), dataset_root().absolute()
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()


def file_bytes(file_name: str | Path) -> int:
    try:
        return os.stat(file_name).st_size
    except FileNotFoundError:
        raise FileNotFoundError(why_missing(str(file_name))) from None
