#!/usr/bin/env python
"""Does DynMoE's sparse and simple gating loss (equation 8) make a token take few experts?

    python benchmarks/sparse_gating.py --save

Nothing but a router trains, on random tokens, by this loss alone. Left: all thresholds are moved
together; tokens take from all experts to none, and the loss, in which thresholds don't occur, stays
what it is. Right: gradient descent on the loss. From orthonormal rows, as ours start, and from
N(0, 1), tokens take half of the experts before and after: a cosine is above zero as often as below.
With the mean score added, a term for few experts that the authors' code has and equation 8 hasn't,
they take fewer and fewer.
"""

from __future__ import annotations

from pathlib import Path

import torch
from dynamic_dino.console import command
from dynamic_dino.moe.losses import SparseGatingLoss
from dynamic_dino.moe.statistics import RoutingStatistics
from dynamic_dino.moe.top_any import TopAnyRouter
from lib.figures import save_figure
from lib.options import add_output, new_parser, place_output
from lib.provenance import provenance, settings, write_json
from torch import Tensor

STARTS = ("orthonormal", "N(0, 1)", "orthonormal, with the mean score")


def taken(router: TopAnyRouter, tokens: Tensor) -> float:
    """Experts a token takes, with the thresholds as they are."""
    statistics = RoutingStatistics()
    statistics.update([router.train()(tokens)])
    return statistics.summary()[0]["experts_per_token"]


def by_threshold(router: TopAnyRouter, tokens: Tensor, limits: list[float]) -> list[dict]:
    """All thresholds at each of the limits: experts a token, and the loss."""
    rows = []
    with torch.no_grad():
        for limit in limits:
            router.thresholds.fill_(limit)
            loss = SparseGatingLoss(1.0)([router.train()(tokens)])
            row = {"threshold": limit, "experts": taken(router, tokens), "loss": float(loss)}
            rows.append(row)
    return rows


def descend(start: str, tokens: Tensor, experts: int, steps: int) -> list[dict]:
    """Adam on the loss alone: experts a token, and the loss, now and then."""
    router, loss_of = TopAnyRouter(tokens.shape[-1], experts), SparseGatingLoss(1.0)
    if start.startswith("N"):
        torch.nn.init.normal_(router.weight)
    optimizer = torch.optim.Adam(router.parameters(), 1e-2)
    rows = []
    for step in range(steps + 1):
        routing = router.train()(tokens)
        loss = loss_of([routing])
        if step % max(steps // 20, 1) == 0:
            row = {"step": step, "experts": taken(router, tokens), "loss": float(loss)}
            rows.append(row)
        if "mean score" in start:
            cosines = (
                torch.nn.functional.normalize(tokens[0])
                @ torch.nn.functional.normalize(router.weight).T
            )
            loss = loss + (cosines - router.thresholds).sigmoid().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return rows


def plot(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    rows = report["thresholds"]
    left.plot([r["threshold"] for r in rows], [r["experts"] for r in rows], label="experts a token")
    losses = [r["loss"] for r in rows]
    left.plot([r["threshold"] for r in rows], losses, "--", label="equation 8")
    left.set(xlabel="threshold of all experts", ylabel="experts a token; loss")
    left.legend(fontsize=8)
    for start, found in report["descent"].items():
        right.plot([r["step"] for r in found], [r["experts"] for r in found], label=start)
    right.set(xlabel="steps on the loss alone", ylim=(0, report["settings"]["experts"]))
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    save_figure(figure, path, dpi=120)


@command
def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--steps", type=int, default=200)
    add_output(parser, plot=True)
    options = parser.parse_args(arguments)
    place_output(options, "sparse_gating")
    torch.manual_seed(0)
    tokens = torch.randn(1, options.tokens, options.dim)
    report = provenance(("torch",)) | {"settings": settings(options)}
    router = TopAnyRouter(options.dim, options.experts)
    limits = [round(-0.3 + 0.03 * i, 2) for i in range(21)]
    report["thresholds"] = by_threshold(router, tokens, limits)
    report["descent"] = {
        start: descend(start, tokens, options.experts, options.steps) for start in STARTS
    }
    for start, rows in report["descent"].items():
        first, last = rows[0], rows[-1]
        print(f"{start}: {first['experts']:.2f} -> {last['experts']:.2f} experts a token")
    if options.json:
        write_json(options.json, report)
    if options.plot:
        plot(report, options.plot)


if __name__ == "__main__":
    main()
