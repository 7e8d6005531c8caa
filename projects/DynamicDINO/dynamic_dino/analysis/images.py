"""The images that a model is analysed on, and what it is asked for in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from omegaconf import DictConfig, OmegaConf

from ..data.datasets import load_datasets
from ..data.loader import build_test_loader
from ..data.mapper import TestMapper


def test_datasets(cfg: DictConfig) -> dict[str, str | int]:
    """The data sets that a recipe tests on -> what `prompt_names` it asks them for."""
    found = {}
    for loader in (OmegaConf.select(cfg, "dataloader.test") or {}).values():
        mapper = loader.get("mapper") or {}
        if isinstance(mapper.get("dataset"), str):
            found[mapper["dataset"]] = mapper.get("prompt_names", "annotated")
    return found


def loader_of(
    cfg: DictConfig,
    dataset: str,
    prompt_names: str | int,
    max_images: int | None = None,
    batch_size: int = 8,
) -> Callable[[], Iterable[list[dict]]]:
    """Makes loaders of the same images of a registered data set, at the recipe's test size; at most
    `max_images`, evenly spread. Features are computed from the images, never taken from a cache.

    Raises ValueError for an unknown data set, or one without images.
    """
    records = load_datasets(dataset)
    if max_images is not None and max_images < len(records):
        rows = np.linspace(0, len(records) - 1, max_images).round().astype(int)
        records = [records[i] for i in rows.tolist()]
    mapper = TestMapper(dataset, cfg.inference.size, prompt_names=prompt_names)
    return lambda: build_test_loader(records, mapper, batch_size)
