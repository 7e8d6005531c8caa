"""Figures of the routings themselves: load, partners, entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .collect import Collection
from .coselection import concentration, correlation, partner_shares
from .figure import ReportFigure, plot, slug

BLUE, ORANGE, GREEN = "#3b6fb6", "#d9822b", "#3a9a5b"


def load_figure(collection: Collection, prefix: str) -> ReportFigure:
    """Utilisation histograms: the share of each layer's slots that go to each expert."""
    layers = collection.layers
    figure, axes = plot(len(layers), height=1.5)
    rows = []
    for axis, layer in zip(axes[:, 0], layers, strict=True):
        share = layer.load / max(layer.load.sum(), 1)
        experts = np.arange(len(share))
        axis.bar(experts, 100 * share, color=BLUE)
        axis.axhline(100 / len(share), color=ORANGE, linestyle="--", linewidth=1)
        axis.set(title=layer.name, ylabel="load, %", xlim=(-0.6, len(share) - 0.4))
        axis.set_xticks(experts[:: 1 + len(experts) // 20])
        rows += [[layer.name, e, int(layer.load[e]), float(share[e])] for e in experts]
    axes[-1, 0].set_xlabel("expert")
    return ReportFigure(
        slug(prefix, "load"),
        "Load of the experts",
        "Each bar is an expert's share of all choices in its layer; the dashed line is an even "
        "load. An expert far below it is hardly used, one at zero is dead.",
        ["layer", "expert", "tokens", "load"],
        rows,
        figure,
    )


def coselection_figure(collection: Collection, prefix: str) -> ReportFigure:
    """Dynamic-DINO, Figure 14: which experts are chosen together, layer by layer."""
    layers = collection.layers
    columns = min(2, len(layers))
    figure, axes = plot(-(-len(layers) // columns), columns, height=2.7)
    rows = []
    for axis in axes.flat[len(layers) :]:
        axis.set_axis_off()
    for axis, layer in zip(axes.flat, layers, strict=False):
        shares = partner_shares(layer.pairs)
        image = axis.imshow(100 * shares, cmap="magma_r", vmin=0, vmax=100)
        axis.set(title=layer.name, xlabel="partner", ylabel="expert")
        ticks = np.arange(0, len(shares), 1 + len(shares) // 8)
        axis.set_xticks(ticks)
        axis.set_yticks(ticks)
        rows += [
            [layer.name, i, j, int(layer.pairs[i, j]), float(shares[i, j])]
            for i in range(len(shares))
            for j in range(len(shares))
            if i != j
        ]
    figure.colorbar(image, ax=axes, label="of the expert's partners, %", shrink=0.8)
    return ReportFigure(
        slug(prefix, "coselection"),
        "Experts that are chosen together",
        "A row says with which other experts its expert shares its tokens; it adds up to 100 %. "
        "One dark field in a row is a fixed partner, an even row an expert that works with all.",
        ["layer", "expert", "partner", "tokens", "share"],
        rows,
        figure,
    )


def partners_figure(collection: Collection, prefix: str) -> ReportFigure:
    """How concentrated partners are with depth."""
    found = [concentration(layer.pairs) for layer in collection.layers]
    names = [layer.name for layer in collection.layers]
    figure, axes = plot(1, 2, height=2.4)
    left, right = axes[0]
    left.plot(names, [c["partners"] for c in found], "o-", color=BLUE)
    left.set(ylabel="effective partners", ylim=(0, None))
    for key, color, label in (("top_1", ORANGE, "the first"), ("top_2", GREEN, "the first two")):
        right.plot(names, [100 * c[key] for c in found], "o-", color=color, label=label)
    right.set(ylabel="of co-selections, %", ylim=(0, 105))
    right.legend(title="most frequent partners", fontsize=8, title_fontsize=8)
    for axis in (left, right):
        axis.tick_params(axis="x", rotation=45 if len(names) > 3 else 0, labelsize=8)
    return ReportFigure(
        slug(prefix, "partners"),
        "Partners with depth",
        "Left: with how many others an expert works, exp(entropy) of its row above. Right: the "
        "share that its one or two most frequent partners have. The paper sees diverse partners "
        "in shallow layers and two or three fixed ones in deep layers.",
        ["layer", "effective_partners", "share_of_first", "share_of_first_two"],
        [[n, c["partners"], c["top_1"], c["top_2"]] for n, c in zip(names, found, strict=True)],
        figure,
    )


def entropy_figure(collection: Collection, prefix: str) -> ReportFigure:
    layers, statistics = collection.layers, collection.statistics
    names = [layer.name for layer in layers]
    figure, axes = plot(height=2.3)
    axis = axes[0, 0]
    axis.plot(names, [row["load_entropy"] for row in statistics], "o-", color=BLUE, label="load")
    known = [(layer.name, layer.entropy) for layer in layers if layer.entropy is not None]
    if known:
        axis.plot(*zip(*known, strict=True), "s-", color=ORANGE, label="router, of one token")
    axis.set(ylabel="entropy", ylim=(0, 1.05))
    axis.legend()
    keys = ("load_entropy", "siblings", "same_part", "rare_experts", "dead_experts")
    rows = [
        [layer.name, layer.entropy, *(None if row[k] == -1 else row[k] for k in keys)]
        for layer, row in zip(layers, statistics, strict=True)
    ]
    return ReportFigure(
        slug(prefix, "entropy"),
        "Entropy of load and router",
        "Load: 1 = all active experts work alike, 0 = one does it all. Router: 1 = a token finds "
        "all experts equally good, 0 = it is sure of its choice. A high load entropy with a low "
        "router entropy means experts that divide the work.",
        ["layer", "router_entropy", *keys],
        rows,
        figure,
    )


def stability_figure(collections: Sequence[Collection], prefix: str) -> ReportFigure:
    """Correlation of co-selection between data sets (the paper's Figure 14 shows three)."""
    names = [c.dataset for c in collections]
    layers = [layer.name for layer in collections[0].layers]
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    figure, axes = plot(height=2.6)
    rows = []
    for i, j in pairs:
        values = [
            correlation(a.pairs, b.pairs)
            for a, b in zip(collections[i].layers, collections[j].layers, strict=True)
        ]
        label = f"{Path(names[j]).name}, {Path(names[i]).name}"  # of a file not its whole path
        axes[0, 0].plot(layers, values, "o-", label=label)
        rows += [[names[j], names[i], *row] for row in zip(layers, values, strict=True)]
    axes[0, 0].set(ylabel="correlation", ylim=(min(0, *(row[3] for row in rows)) - 0.05, 1.05))
    axes[0, 0].legend(fontsize=8)
    return ReportFigure(
        slug(prefix, "stability"),
        "The same partners on other data",
        "Pearson's correlation, over all pairs of experts, of how often they are chosen together "
        "on two data sets. 1: the same partners whatever the data; the paper sees nearly that.",
        ["data set", "other", "layer", "correlation"],
        rows,
        figure,
    )


def spread_figure(collections: Mapping[str, Collection], prefix: str) -> ReportFigure:
    """Utilisation of several runs: experts have no common names, so they are ranked by load."""
    layers = [layer.name for layer in next(iter(collections.values())).layers]
    figure, axes = plot(len(layers), height=1.5)
    rows = []
    for n, (axis, name) in enumerate(zip(axes[:, 0], layers, strict=True)):
        loads = [
            np.sort(c.layers[n].load / c.layers[n].load.sum())[::-1] for c in collections.values()
        ]
        mean = np.mean(loads, 0)
        spread = np.std(loads, 0, ddof=1)
        ranks = np.arange(1, len(mean) + 1)
        axis.bar(ranks, 100 * mean, yerr=100 * spread, color=BLUE, ecolor=ORANGE, capsize=2)
        axis.set(title=name, ylabel="load, %")
        rows += [
            [name, int(r), float(m), float(s)] for r, m, s in zip(ranks, mean, spread, strict=True)
        ]
    axes[-1, 0].set_xlabel("rank of the expert")
    return ReportFigure(
        slug(prefix, "load-of-runs"),
        "Load of the experts, all runs",
        "Experts of different runs have nothing in common but their rank: bars are the mean load "
        "of the most used expert, the second, and so on; lines are the standard deviation over "
        "runs.",
        ["layer", "rank", "mean", "std"],
        rows,
        figure,
    )
