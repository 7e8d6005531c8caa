"""Figures of what single experts are good for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from .collect import Collection
from .combinations import (
    chance_information,
    class_expert_shares,
    information,
    label,
    object_combinations,
    preferences,
)
from .drop import Drop
from .expert_ap import SUBSETS, ExpertRow
from .figure import ReportFigure, plot, slug
from .objects import COVERED, Objects

COLORS = {"all": "#8a8a8a", "small": "#3b6fb6", "occluded": "#d9822b", "tail": "#3a9a5b"}
NAMES_SHOWN = 16


def expert_table_figure(rows: Sequence[ExpertRow], prefix: str) -> list[ReportFigure]:
    """HI-MoE's Table 8, and its Figure 2."""
    routed = any(row.route is not None for row in rows)
    return [_expert_table(rows, prefix, routed), _expert_bars(rows, prefix, routed)]


def _expert_table(rows: Sequence[ExpertRow], prefix: str, routed: bool) -> ReportFigure:
    subsets = [s for s in SUBSETS if s != "all"]
    head = [
        "expert",
        "load",
        "AP",
        *(f"AP {s}" for s in subsets),
        *(f"{s} objects" for s in SUBSETS),
    ]
    head[-len(SUBSETS)] = "objects"
    head += ["scene route", "its share"] if routed else []
    cells = []
    for row in rows:
        ap = [None if row.ap[s] < 0 else row.ap[s] for s in SUBSETS]
        cells.append(["all" if row.expert is None else row.expert, row.load, *ap])
        cells[-1] += [row.objects[s] for s in SUBSETS]
        cells[-1] += [row.route, row.route_share] if routed else []
    reading = (
        "Of an expert are the objects whose best-fitting query took it in the last decoder layer, "
        "and the detections of such queries; objects of others don't count. Small: below 32 x 32 "
        f"pixels; occluded: {100 * COVERED:.0f} % of the box lie in another object's; tail: rare "
        "classes. A mean over few objects is noise: look at their numbers. An expert sees fewer "
        "wrong detections than the whole model: compare experts with each other. Dash: no such "
        "object."
    )
    if routed:
        reading += " Scene route: the most frequent one among the expert's own tokens."
    return ReportFigure(slug(prefix, "experts"), "AP of every expert", reading, head, cells)


def _route(row: ExpertRow) -> str:
    """As a label: a number alone would be read as one."""
    return f"route {row.route}" if (row.route or "").isdigit() else row.route or ""


def _expert_bars(rows: Sequence[ExpertRow], prefix: str, routed: bool) -> ReportFigure:
    subsets = [s for s in SUBSETS if s != "all"]
    experts = [row for row in rows if row.expert is not None]
    figure, axes = plot(3 + routed, height=1.5)
    for axis, subset in zip(axes[:, 0], subsets, strict=False):
        values = [max(row.ap[subset], 0) for row in experts]
        axis.bar([row.expert for row in experts], values, color=COLORS[subset])
        if rows[0].ap[subset] >= 0:
            axis.axhline(rows[0].ap[subset], color="black", linestyle="--", linewidth=1)
        axis.set(title=subset, ylabel="AP", xlim=(-0.6, len(experts) - 0.4))
        axis.set_xticks(range(0, len(experts), 1 + len(experts) // 20))
    if routed:
        bars = axes[-1, 0].bar(
            [row.expert for row in experts],
            [100 * (row.route_share or 0) for row in experts],
            color="#8a5fb0",
        )
        routes = [_route(row) for row in experts]
        axes[-1, 0].bar_label(bars, routes, fontsize=6, rotation=90, padding=2)
        axes[-1, 0].set(title="dominant scene route", ylabel="share, %", ylim=(0, 150))
    axes[-1, 0].set_xlabel("expert")
    return ReportFigure(
        slug(prefix, "experts-figure"),
        "Experts on small, occluded and rare objects",
        "The table above as bars; the dashed line is the whole model. Bars that differ more than "
        "their numbers of objects explain are a sign of specialisation, not a proof: see what is "
        "lost without the expert.",
        [
            "expert",
            *(f"AP {s}" for s in subsets),
            *(["scene route", "its share"] if routed else []),
        ],
        [
            [row.expert, *(None if row.ap[s] < 0 else row.ap[s] for s in subsets)]
            + ([row.route, row.route_share] if routed else [])
            for row in experts
        ],
        figure,
    )


def drop_figure(reference: dict[str, float], drops: Sequence[Drop], prefix: str) -> ReportFigure:
    layers = list(dict.fromkeys(drop.layer for drop in drops))
    figure, axes = plot(len(layers), height=2.0)
    for axis, name in zip(axes[:, 0], layers, strict=True):
        mine = [drop for drop in drops if drop.layer == name]
        subsets = [s for s in SUBSETS if s in mine[0].change]
        for k, subset in enumerate(subsets):
            x = np.arange(len(mine)) + (k - (len(subsets) - 1) / 2) * 0.8 / len(subsets)
            values = [drop.change[subset] for drop in mine]
            axis.bar(x, values, 0.8 / len(subsets), color=COLORS[subset], label=subset)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=name, ylabel="change of AP", xticks=range(len(mine)))
        axis.set_xticklabels([drop.expert for drop in mine], fontsize=8)
    axes[0, 0].legend(fontsize=7, ncols=4)
    axes[-1, 0].set_xlabel("expert that is dropped")
    rows = [
        [d.layer, d.expert, d.load, *(None if d.ap[s] < 0 else d.ap[s] for s in SUBSETS)]
        + [d.change.get(s) for s in SUBSETS]
        for d in sorted(drops, key=lambda d: d.change.get("all", 0))
    ]
    head = [
        "layer",
        "dropped",
        "load",
        *(f"AP {s}" for s in SUBSETS),
        *(f"change {s}" for s in SUBSETS),
    ]
    return ReportFigure(
        slug(prefix, "drop"),
        "What is lost without an expert",
        "The model is evaluated without one expert at a time: its tokens take their next best "
        f"ones. With all experts AP is {reference['all']:.1f}. A bar near zero is an expert that "
        "others can replace; one below zero only for small, occluded or rare objects is a "
        "specialist.",
        head,
        rows,
        figure,
    )


def names_figures(collection: Collection, objects: Objects, prefix: str) -> list[ReportFigure]:
    """Which names prefer which experts ("refrigerator: 0, 3")."""
    layers = [layer.name for layer in collection.decoder]
    table, summary = [], []
    for n, name in enumerate(layers):
        pairs = object_combinations(collection, objects, n)
        if not pairs:
            return []
        found = preferences(pairs, collection.names)
        table += [[name, p.name, label(p.experts), p.objects, p.share, p.lift] for p in found]
        summary.append((name, information(pairs), chance_information(pairs)))
    table.sort(key=lambda row: -layers.index(row[0]))  # the last layer first; stable
    *_, (_, told, chance) = summary
    listing = ReportFigure(
        slug(prefix, "names"),
        "Names and the experts they go to",
        "Of the objects of a name, the share whose query took its most frequent combination of "
        "experts, and how many times the share of all objects that is. In the last layer the name "
        f"tells {100 * told:.0f} % of the choice of experts; if names are shuffled, so that they "
        f"tell nothing, {100 * chance:.0f} % by chance.",
        ["layer", "name", "experts", "objects", "share", "lift"],
        table,
        shown=20,
    )
    experts = len(collection.decoder[-1].load)
    frequent = [c for c, _ in Counter(c for c, _ in pairs).most_common(NAMES_SHOWN)]
    shares = class_expert_shares(pairs, experts, frequent)
    order = np.argsort(shares.argmax(1), kind="stable")
    titles = [collection.names[frequent[i]] for i in order]
    figure, axes = plot(height=1.2 + 0.22 * len(titles))
    image = axes[0, 0].imshow(100 * shares[order], aspect="auto", cmap="magma_r", vmin=0)
    axes[0, 0].set(xlabel=f"expert of {layers[-1]}", yticks=range(len(titles)))
    axes[0, 0].set_yticklabels([t if len(t) < 24 else t[:22] + "…" for t in titles], fontsize=8)
    figure.colorbar(image, ax=axes[0, 0], label="of the name's choices, %")
    heat = ReportFigure(
        slug(prefix, "names-experts"),
        "Experts of the most frequent names",
        "A row is what the objects of a name chose in the last decoder layer. Equal rows: experts "
        "don't care what an object is called.",
        ["name", *(f"expert {e}" for e in range(experts))],
        [[t, *shares[i].tolist()] for t, i in zip(titles, order, strict=True)],
        figure,
    )
    told = ReportFigure(
        slug(prefix, "names-information"),
        "How much a name tells of the experts",
        "Mutual information of name and combination over the entropy of combinations, and the same "
        "with shuffled names: what exceeds that is specialisation by name.",
        ["layer", "information", "with shuffled names"],
        [list(row) for row in summary],
    )
    return [listing, heat, told]
