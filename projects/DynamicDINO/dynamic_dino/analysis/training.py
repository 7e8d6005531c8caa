"""Curves over training, of one run or several, from their metrics.json."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from .figure import ReportFigure, plot, slug

CURVES = {
    "load_entropy": "entropy of the load",
    "router_entropy": "entropy of the router",
    "siblings": "tokens with a whole FFN",
    "scene_entropy": "entropy of the scene router",
    "active_experts": "active experts",
    "experts_per_token": "experts per token",
    "unrouted_tokens": "tokens without an expert",
    "dead_experts": "experts without a token",
}
LOGGED = re.compile(r"moe/(layer\d+)/(\w+)")  # not what evaluations log


def training_curves(runs: Mapping[str, list[dict]], prefix: str = "") -> ReportFigure | None:
    """Each statistic by iteration, one line for a layer: its mean over the runs, with a band of one
    standard deviation.

    Args:
        runs: rows of metrics.json by the run's name.

    Returns None where none of them logged any.
    """
    # statistic -> layer -> iteration -> values of the runs
    found: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for rows in runs.values():
        for row in rows:
            for key, value in row.items():
                match = LOGGED.fullmatch(key)
                if match and match[2] in CURVES and value is not None:
                    found[match[2]][match[1]][row["iteration"]].append(value)
    names = [name for name in CURVES if name in found]
    if not names:
        return None
    figure, axes = plot(-(-len(names) // 2), 2, height=2.1)
    table = []
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        for layer, curve in sorted(found[name].items()):
            iterations = sorted(curve)
            mean = np.array([np.mean(curve[i]) for i in iterations])
            spread = np.array(
                [np.std(curve[i], ddof=1) if len(curve[i]) > 1 else 0 for i in iterations]
            )
            [line] = axis.plot(iterations, mean, label=layer, linewidth=1)
            if spread.any():
                band = (mean - spread, mean + spread)
                axis.fill_between(iterations, *band, color=line.get_color(), alpha=0.2)
            table += [
                [name, layer, i, float(m), float(s), len(curve[i])]
                for i, m, s in zip(iterations, mean, spread, strict=True)
            ]
        axis.set_title(CURVES[name], fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set_xlabel("iteration", fontsize=8)
    axes[0, 0].legend(fontsize=7)
    return ReportFigure(
        slug(prefix, "training"),
        "Routing while training",
        "Entropies: 1 = even. A load entropy that falls means experts that are given up; a router "
        "entropy that falls means tokens that become sure of their experts. "
        + ("Lines are means over the runs, bands one standard deviation." if len(runs) > 1 else ""),
        ["statistic", "layer", "iteration", "mean", "std", "runs"],
        table,
        figure,
        shown=0,
    )
