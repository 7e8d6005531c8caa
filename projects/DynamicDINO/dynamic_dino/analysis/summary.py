"""A few numbers of a model on a data set, and several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .collect import Collection
from .coselection import concentration
from .expert_ap import ExpertRow
from .figure import ReportFigure, slug


def summary(collection: Collection, whole: ExpertRow | None) -> dict[str, float]:
    """Name -> number; what there is no number for is left out."""
    numbers: dict[str, float] = {}
    if whole is not None:
        names = {"all": "AP", "small": "AP small", "occluded": "AP occluded", "tail": "AP tail"}
        numbers |= {names[k]: value for k, value in whole.ap.items() if value >= 0}
    for layer, row in zip(collection.layers, collection.statistics, strict=True):
        found = {
            "load entropy": row["load_entropy"],
            "router entropy": layer.entropy,
            "dead experts": row["dead_experts"],
            "experts per token": row["experts_per_token"],
            "siblings": row["siblings"],
            "effective partners": concentration(layer.pairs)["partners"],
        }
        numbers |= {
            f"{layer.name}: {name}": float(value)
            for name, value in found.items()
            if value is not None and value != -1
        }
    return numbers


def side_by_side(runs: Mapping[str, dict[str, float]], prefix: str) -> ReportFigure:
    """Each number of every run, its mean and, from two runs on, the standard deviation (of a
    sample: n - 1)."""
    names = list(dict.fromkeys(name for numbers in runs.values() for name in numbers))
    rows = []
    for name in names:
        values = [numbers.get(name) for numbers in runs.values()]
        known = [v for v in values if v is not None]
        spread = float(np.std(known, ddof=1)) if len(known) > 1 else None
        rows.append([name, *values, float(np.mean(known)), spread])
    several = len(runs) > 1
    return ReportFigure(
        slug(prefix, "runs" if several else "numbers"),
        "Numbers, run by run" if several else "Numbers",
        "Runs that differ by their seed alone show how much chance decides: differences smaller "
        "than the spread (standard deviation) mean nothing."
        if several
        else "COCO AP in percent, of all objects, and of those that are hard (see below).",
        ["", *runs, "mean", "spread"] if several else ["", *runs],
        rows if several else [row[:2] for row in rows],
    )
