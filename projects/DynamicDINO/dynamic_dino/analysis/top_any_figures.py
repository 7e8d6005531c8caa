"""Figures of DynMoE's layers (arXiv 2405.14297; its Figures 5 and 6 and those of its appendix 8):
how many experts a token takes, how often each is taken, how alike they are, their thresholds."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

from ..moe.top_any import TopAnyRouter
from .collect import Collection
from .figure import ReportFigure, plot, slug
from .layers import moe_layers


def top_any_figures(model: nn.Module, collection: Collection, prefix: str) -> list[ReportFigure]:
    """Of a model whose routers are top-any ones; of another, none."""
    routers = {
        name: layer.router
        for name, layer in moe_layers(model).items()
        if isinstance(layer.router, TopAnyRouter)
    }
    if not routers:
        return []
    return [
        experts_per_token(collection, prefix),
        activation_frequency(collection, prefix),
        similarity(routers, prefix),
        thresholds(routers, prefix),
        shared_experts(routers, collection, prefix),
    ]


def experts_per_token(collection: Collection, prefix: str) -> ReportFigure:
    names = [layer.name for layer in collection.layers]
    figure, axes = plot(2, height=2.2)
    top, bottom = axes[:, 0]
    top.bar(names, [row["experts_per_token"] for row in collection.statistics])
    top.set(ylabel="experts per token")
    rows = []
    for name, row in zip(names, collection.statistics, strict=True):
        shares = row["experts_per_token_distribution"]
        bottom.plot(100 * np.array(shares), "o-", label=name)
        rows += [[name, k, share] for k, share in enumerate(shares)]
    bottom.set(xlabel="experts", ylabel="tokens, %", ylim=(0, None))
    bottom.legend(fontsize=8)
    return ReportFigure(
        slug(prefix, "experts-per-token"),
        "How many experts a token takes",
        "Above the mean of each layer, below the share of tokens that take 0, 1, 2, ... experts.",
        ["layer", "experts", "share_of_tokens"],
        rows,
        figure,
    )


def activation_frequency(collection: Collection, prefix: str) -> ReportFigure:
    """One circle for each layer and expert, its area the share of the tokens that take it."""
    figure, axes = plot(height=1.4 + 0.4 * len(collection.layers))
    axis, rows = axes[0, 0], []
    for i, layer in enumerate(collection.layers):
        share = layer.load / max(layer.tokens, 1)
        axis.scatter(range(len(share)), np.full(len(share), i), s=300 * share)
        for expert, value in enumerate(share.tolist()):
            axis.annotate(f"{100 * value:.0f}", (expert, i), ha="center", va="center", fontsize=7)
            rows.append([layer.name, expert, value])
    axis.set(xlabel="expert", yticks=range(len(collection.layers)))
    axis.set_yticklabels([layer.name for layer in collection.layers])
    axis.margins(0.1, 0.3)
    return ReportFigure(
        slug(prefix, "activation-frequency"),
        "Tokens that an expert is active for, %",
        "A layer where all tokens take the same experts needs no mixture; an expert that all "
        "tokens take is a shared one.",
        ["layer", "expert", "share_of_tokens"],
        rows,
        figure,
    )


def similarity(routers: dict[str, TopAnyRouter], prefix: str) -> ReportFigure:
    """Cosines between the active experts' representations."""
    columns = min(2, len(routers))
    figure, axes = plot(-(-len(routers) // columns), columns, height=2.7)
    rows = []
    for axis in axes.flat[len(routers) :]:
        axis.set_axis_off()
    for axis, (name, router) in zip(axes.flat, routers.items(), strict=False):
        slots = router.active.nonzero().flatten().tolist()
        unit = F.normalize(router.weight.detach()[router.active].float())
        cosines = (unit @ unit.T).cpu().numpy()
        image = axis.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set(title=name, xticks=range(len(slots)), yticks=range(len(slots)))
        axis.set_xticklabels(slots)
        axis.set_yticklabels(slots)
        rows += [
            [name, a, b, float(cosines[i, j])]
            for i, a in enumerate(slots)
            for j, b in enumerate(slots)
        ]
    figure.colorbar(image, ax=axes, label="cosine", shrink=0.8)
    return ReportFigure(
        slug(prefix, "similarity"),
        "How alike the experts are",
        "Cosines between what the routers look for; red off the diagonal means experts that are "
        "taken together.",
        ["layer", "expert", "other", "cosine"],
        rows,
        figure,
    )


def thresholds(routers: dict[str, TopAnyRouter], prefix: str) -> ReportFigure:
    figure, axes = plot(len(routers), height=1.5)
    rows = []
    for axis, (name, router) in zip(axes[:, 0], routers.items(), strict=True):
        slots = router.active.nonzero().flatten().tolist()
        values = router.thresholds.detach().float().cpu()[slots].tolist()
        axis.bar([str(slot) for slot in slots], values)
        axis.set(title=name, ylabel="threshold G")
        rows += [[name, slot, value] for slot, value in zip(slots, values, strict=True)]
    axes[-1, 0].set_xlabel("expert")
    return ReportFigure(
        slug(prefix, "thresholds"),
        "Thresholds of the experts",
        "The cosine beyond which a token takes the expert: one with a low threshold is shared by "
        "most tokens.",
        ["layer", "expert", "threshold"],
        rows,
        figure,
    )


def shared_experts(
    routers: dict[str, TopAnyRouter], collection: Collection, prefix: str
) -> ReportFigure:
    """Does a layer have one expert of low threshold that most tokens share (DynMoE, appendix 8)?"""
    counts = {layer.name: layer for layer in collection.layers}
    rows = []
    for name, router in routers.items():
        slots = router.active.nonzero().flatten().tolist()
        limits = router.thresholds.detach().double().cpu().numpy()[slots]
        share = np.asarray(counts[name].load)[slots] / max(counts[name].tokens, 1)
        lowest = int(limits.argmin())
        others = np.delete(np.arange(len(slots)), lowest)
        if not len(others):
            continue
        spread = limits[others].std()
        below = (limits[others].mean() - limits[lowest]) / spread if spread else float("nan")
        varied = np.ptp(limits) and np.ptp(share)
        rank = float(spearmanr(limits, share).statistic) if varied else float("nan")
        values = (limits[lowest], below, share[lowest], share[others].mean(), rank)
        rows.append([name, slots[lowest], *map(float, values)])
    return ReportFigure(
        slug(prefix, "shared-experts"),
        "The expert of the lowest threshold",
        "How far its threshold lies below the mean of the others, in their standard deviations; "
        "the share of tokens that take it, and the others on the average; the rank correlation of "
        "thresholds and shares, which is near -1 where low thresholds make shared experts.",
        ["layer", "expert", "threshold", "deviations_below", "share", "share_of_others", "rank"],
        rows,
    )
