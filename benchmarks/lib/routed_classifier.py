"""Routers in the FFNs of an encoder, compared on a classification task: what language.py and
domains.py share.

Every row of a comparison starts as the same dense encoder. Its FFNs, the routers that they get, and
a linear head on the mean token train; the rest is frozen, and what lies below is computed once.
"""

from __future__ import annotations

import argparse
import copy
import json
import runpy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from dynamic_dino.modeling.feed_forward import FeedForward
from dynamic_dino.moe.adaptive import AdaptiveExperts
from dynamic_dino.moe.losses import RouterLoss
from dynamic_dino.moe.routers import Router
from dynamic_dino.moe.routing import Routing
from dynamic_dino.moe.statistics import RoutingStatistics
from dynamic_dino.moe.top_any import TopAnyRouter
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lib.detectors import ROOT
from lib.figures import save_figure
from lib.paired import estimate

EXAMPLE = ROOT / "projects/DynamicDINO/docs/examples/dynmoe_bert.py"


@dataclass
class Samples:
    """Hidden states of the real tokens of each sample [L, C], and their classes [n]."""

    states: Sequence[Tensor]
    labels: Tensor

    def batch(self, chosen: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """states [B, L, C], mask int64 [B, L], labels [B]"""
        states = [self.states[i] for i in chosen]
        mask = pad_sequence([torch.ones(len(s), dtype=torch.long) for s in states], True)
        return pad_sequence(states, True), mask, self.labels[chosen]


@dataclass
class Row:
    """How the FFNs of a row choose their experts, None: dense, and then `copies` times as wide."""

    title: str
    router: Callable[[int], Router] | None
    losses: list[RouterLoss] = field(default_factory=list)
    copies: int = 1


class Classifier(nn.Module):
    """The upper layers of an encoder, and a linear head on the mean of the real tokens."""

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.eval().requires_grad_(False)
        for part in (encoder.ffns, self.head):
            part.requires_grad_(True)

    def train(self, mode: bool = True) -> Classifier:
        """What is frozen stays in evaluation mode: no dropout."""
        super().train(False)
        self.encoder.ffns.train(mode)
        return self

    def forward(self, states: Tensor, mask: Tensor) -> tuple[Tensor, list[Routing]]:
        hidden, routings = self.encoder.layers(states, mask)
        return self.head(hidden.sum(1) / mask.sum(1, keepdim=True)), routings


@cache
def example() -> dict:
    return runpy.run_path(str(EXAMPLE))


def classifier(bert: nn.Module, row: Row, classes: int, first: int = 0) -> Classifier:
    """A row's model: that of a BERT from layer `first` on, and a new head. It equals the dense
    encoder until it is trained."""
    head = nn.Linear(bert.config.hidden_size, classes)
    encoder = example()["MoEBert"](copy.deepcopy(bert), row.router, first)
    if row.copies > 1:
        encoder.ffns = nn.ModuleList(widened(ffn, row.copies) for ffn in encoder.ffns)
    return Classifier(encoder, head)


def widened(ffn: FeedForward, copies: int) -> FeedForward:
    """A dense FFN of `copies` times as many units, which computes the same."""
    units, dim = ffn.linear1.weight.shape
    wide = FeedForward(dim, copies * units, ffn.activation, widen=True)
    wide.load_state_dict(ffn.state_dict())
    return wide


def ffn_operations(model: Classifier, tokens: int, routings: list[Routing]) -> float:
    """Multiply-adds of one forward pass of FFNs and routers."""
    total = 0.0
    for i, ffn in enumerate(model.encoder.ffns):
        dim = model.head.in_features
        if routings:
            slots = int((routings[i].expert_ids >= 0).sum())
            total += tokens * routings[i].num_experts * dim
            total += slots * 2 * dim * (ffn.hidden // ffn.parts)
        else:
            total += tokens * 2 * dim * ffn.linear1.out_features
    return total


def operations(model: Classifier, mask: Tensor, routings: list[Routing]) -> float:
    """Multiply-adds of a training step: forward and backward of FFNs and routers, forward of the
    frozen attention, and the gradient of its input in all layers but the first."""
    tokens, pairs = int(mask.sum()), int((mask.sum(1) ** 2).sum())
    dim, layers = model.head.in_features, len(model.encoder.ffns)
    attention = 4 * tokens * dim**2 + 2 * pairs * dim
    return attention * (2 * layers - 1) + 3 * ffn_operations(model, tokens, routings)


@torch.no_grad()
def evaluate(model: Classifier, samples: Samples) -> tuple[float, list[dict]]:
    """Accuracy in percent, and the routing of each layer."""
    model.eval()
    right, statistics = 0, RoutingStatistics()
    order = sorted(range(len(samples.states)), key=lambda i: len(samples.states[i]))
    for i in range(0, len(order), 64):
        states, mask, labels = samples.batch(order[i : i + 64])
        logits, routings = model(states, mask)
        right += int((logits.argmax(1) == labels).sum())
        if routings:
            statistics.update(routings)
    return 100 * right / len(order), statistics.summary()


def batches(count: int, epochs: int, size: int, seed: int) -> Iterator[list[int]]:
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for part in torch.randperm(count, generator=order).split(size):
            yield part.tolist()


def train(
    model: Classifier,
    row: Row,
    data: Samples,
    todo: Sequence[list[int]],
    tests: Mapping[str, Samples],
    options: argparse.Namespace,
    forced: Sequence[int] = (),
) -> dict:
    """What a row comes to: its scores over training, its routing, and what it computed.

    Args:
        todo: the samples of each step.
        tests: scored at each of the curve's points. "accuracy" is the one whose routing is told.
        options: lr; points of the curve; period, the steps after which experts come and go.
        forced: of a top-any model, how many best experts a token gets in further evaluations.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, options.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(todo))
    routers = [m for m in model.modules() if isinstance(m, TopAnyRouter)]
    adaptive = AdaptiveExperts(model) if routers else None
    stops = {round(len(todo) * part / options.points) for part in range(1, options.points + 1)}
    curve, spent, ffns, taken = [], 0.0, 0.0, 0.0
    routing: list[dict] = []
    for step, chosen in enumerate(tqdm(todo, desc=row.title, leave=False), 1):
        states, mask, labels = data.batch(chosen)
        logits, routings = model.train()(states, mask)
        loss = F.cross_entropy(logits, labels) + sum(term(routings) for term in row.losses)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        spent += operations(model, mask, routings)
        tokens = int(mask.sum())
        ffns += 3 * ffn_operations(model, tokens, routings)
        slots = sum(int((r.expert_ids >= 0).sum()) for r in routings) / max(len(routings), 1)
        taken += (slots / tokens if routings else 1) / len(todo)
        if adaptive:
            adaptive.record(routings)
            if step % options.period == 0 and step < len(todo):
                adaptive.adapt(optimizer)
        if step in stops:
            found = {name: evaluate(model, samples) for name, samples in tests.items()}
            routing = found["accuracy"][1]
            point = {"step": step, "gmacs": spent / 1e9}
            point |= {name: score for name, (score, _) in found.items()}
            if routing:
                point["experts_per_token"] = [layer["experts_per_token"] for layer in routing]
            curve.append(point)
    result = {"accuracy": curve[-1]["accuracy"], "curve": curve, "train_experts_per_token": taken}
    result |= {"ffn_gmacs": ffns / 1e9, "routing": routing}
    for k in forced if routers else ():
        for router in routers:
            router.forced_k = k
        result.setdefault("forced", {})[str(k)] = evaluate(model, tests["accuracy"])[0]
    return result


def with_seeds(report: dict, path: Path | None) -> dict:
    """The report with the seeds that its file has already.

    Raises:
        SystemExit: they were measured with other settings.
    """
    report["seeds"] = {}
    if path and path.is_file():
        old = json.loads(path.read_text())
        if old["settings"] != report["settings"]:
            raise SystemExit(f"{path} is of {old['settings']}: delete it to start anew")
        report["seeds"] = old["seeds"]
    return report


def plot(
    rows: Mapping[str, Row], curves: Mapping[str, Sequence[list[dict]]], path: Path, title: str
) -> None:
    """Accuracy over the operations of training: means over seeds, a dot each seed.

    Args:
        curves: of each row, one curve a seed: points with "gmacs" and "accuracy".
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2))
    for number, (name, row) in enumerate(rows.items()):
        points = list(zip(*curves[name], strict=True))
        x = [estimate([p["gmacs"] for p in same]).mean for same in points]
        y = [estimate([p["accuracy"] for p in same]).mean for same in points]
        axis.plot(x, y, "-", color=f"C{number}", label=row.title)
        for curve in curves[name]:
            axis.plot(
                [p["gmacs"] for p in curve],
                [p["accuracy"] for p in curve],
                ".",
                color=f"C{number}",
                alpha=0.5,
            )
    axis.set(
        xscale="log",
        xlabel="training, 10⁹ multiply-adds",
        ylabel="accuracy, percent",
        title=title,
    )
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    save_figure(figure, path)
