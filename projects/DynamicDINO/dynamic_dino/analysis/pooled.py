"""Several data sets counted as one: ODinW13 of Dynamic-DINO's Figure 14, pooled over its sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..data.odinw import ODINW13, ODINW35, odinw_names
from ..evaluation.predictions import DatasetPredictions
from .collect import Collection, LayerCounts

GROUPS = {"odinw13": ODINW13, "odinw35": ODINW35}


def members(pool: str) -> tuple[str, list[str]]:
    """The title and the data sets of "odinw13", "odinw35", or "TITLE=NAME,NAME,...".

    Raises:
        ValueError: neither; fewer than two names, or one that is there twice.
    """
    if pool.lower() in GROUPS:
        return pool, odinw_names(GROUPS[pool.lower()], prompts=True)
    title, _, names = pool.partition("=")
    sets = [name.strip() for name in names.split(",") if name.strip()]
    if not title or len(sets) < 2 or len(set(sets)) < len(sets):
        raise ValueError(
            f"--pool {pool!r}: write {' or '.join(GROUPS)}, or a title and two or more data sets, "
            "each once, such as mine=one_val,two_val"
        )
    return title, sets


def pooled(title: str, collections: Iterable[Collection]) -> Collection:
    """What one model did on all of the sets: tokens, loads and pairs add up, so that a set counts
    by its tokens. Of detections and objects, whose names differ from set to set, nothing."""
    layers: list[LayerCounts] = []
    files: dict[int | str, str] = {}
    for found in collections:
        files |= {f"{found.dataset}/{image}": file for image, file in found.files.items()}
        parts = found.layers
        layers = [_sum(a, b) for a, b in zip(layers, parts, strict=True)] if layers else parts
    nothing = np.zeros((0, 0, 0), np.int16)
    return Collection(title, layers, [], DatasetPredictions.cat([]), nothing, files, {})


def _sum(a: LayerCounts, b: LayerCounts) -> LayerCounts:
    tokens, entropy, routes = a.tokens + b.tokens, None, None
    if a.entropy is not None and b.entropy is not None:
        entropy = (a.entropy * a.tokens + b.entropy * b.tokens) / max(tokens, 1)
    if a.routes is not None and b.routes is not None:
        routes = a.routes + b.routes
    load, pairs = a.load + b.load, a.pairs + b.pairs
    return LayerCounts(a.name, load, pairs, routes, a.named, tokens, entropy)


def check_pools(pools: Sequence[str], datasets: Sequence[str]) -> dict[str, list[str]]:
    """{title: data sets} of several `members`.

    Raises:
        ValueError: as there, or two pools, or a pool and a data set, have one title.
    """
    found = dict(map(members, pools))
    if len(found) < len(pools) or found.keys() & set(datasets):
        raise ValueError("--pool: each pool needs a title of its own, which no data set has")
    return found
