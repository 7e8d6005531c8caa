"""What the predictions of an evaluation depend on, as a few hashes.

Kept with `evaluation.prediction_log`, for the reason given there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import dynamic_dino_kernels
import torch
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..data.datasets import load_datasets
from ..data.ground_truth import annotation_files
from ..data.once import read_once

SPEED_ONLY = ("batch_size", "num_workers")  # of a loader


def fingerprint(
    model: nn.Module,
    weights: str,
    loader: DictConfig,
    evaluator: DictConfig,
    model_config: DictConfig,
    dtype: torch.dtype | None,
) -> dict[str, str]:
    """{what predictions depend on, in words for a message: its hash}; {} in processes other than
    the main one.

    Args:
        weights: `module_fingerprint` of the model, which takes half a second and is the same for
            all test sets.

    Not in it: how many processes, workers and images a batch. Protocol and limit are, because what
    can't count by them isn't written down.
    """
    dataset = evaluator["dataset_name"]
    files = annotation_files(dataset)
    if not all(file.is_file() for file in files):
        load_datasets(dataset)  # raises in every process, with the remedy, unless it has come since
    if not comm.is_main_process():
        return {}
    settings = {key: value for key, value in loader.items() if key not in SPEED_ONLY}
    return {
        "data set": read_once(("hash", dataset), files, partial(_hash_files, files)),
        "loader (prompts, image size)": hash_of_config(settings),
        "model": hash_of_config([model_config, evaluator.get("detector")]),
        "protocol": hash_of_config([evaluator.get("protocol"), evaluator.get("max_dets")]),
        "set of weights": weights[:16],
        "device or precision": f"{next(model.parameters()).device.type}, {dtype or 'float32'}",
        "version of the code": _hash_code(),
    }


def hash_of_config(node: Any) -> str:
    """Of a part of a recipe, its functions by their names."""

    def plain(value: Any) -> Any:
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, Callable):
            return f"{value.__module__}.{value.__qualname__}"
        return value

    return _hash(json.dumps(plain(node), sort_keys=True, default=repr).encode())


def _hash_files(paths: list[Path]) -> str:
    result = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                result.update(block)
    return result.hexdigest()[:16]


@cache
def _hash_code() -> str:
    folders = [Path(__file__).parents[1], Path(dynamic_dino_kernels.__file__).parent]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return _hash(torch.__version__.encode() + b"".join(path.read_bytes() for path in files))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
