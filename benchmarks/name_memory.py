#!/usr/bin/env python
"""How many names a decoder's FFNs can remember, dense or as experts; the rest of it left away.

    python -m dynamic_dino.data.synthetic.glyphs   # its features are cached by this script
    python benchmarks/name_memory.py --seeds 0 1 2 3 4
    python benchmarks/name_memory.py --search      # more ways to learn the routing
    python benchmarks/name_memory.py --tuning 1500 --rows control x16 alpha_0 \\
        --json benchmarks/results/cpu/name_memory_long.json

A detector must do much more than to remember names, and takes long to train. Here nano's frozen
features at the centre of a glyph (three levels side by side) pass a linear map and the FFNs of the
decoder, y = norm(x + ffn(x)) layer by layer, and are compared with the embeddings of all names, as
by the class head. The loss is cross entropy; scored is how often the right one of 720 names is
first, in percent, on pictures of `glyphs_val`, where all names are equally frequent.

`width`: dense FFNs of several widths, from scratch. `tuning`: MoE-Tuning of the dense one of 64
units: only experts and routers train on, in the control only the dense FFNs, for as many steps on
the same data in the same order. Each seed has a base of its own; what is done is kept, and left
out another time. `--search` are other rows, kept in name_memory_search.json: does any way to learn
the paper's routing end above a router that stays as it was drawn? Results and tables:
benchmarks/results/cpu/name_memory.json, ABLATIONS.md.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import BoxMode
from dynamic_dino.config import load_config
from dynamic_dino.console import command
from dynamic_dino.data.catalog import dataset_root
from dynamic_dino.data.datasets import get_metadata, load_datasets
from dynamic_dino.data.feature_cache import FeatureCache, cache_features
from dynamic_dino.modeling.feed_forward import FeedForward
from dynamic_dino.modeling.heads import ContrastiveHead
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.modeling.text import TextEncoder
from dynamic_dino.moe.adaptive import AdaptiveExperts
from dynamic_dino.moe.hierarchical import HierarchicalRouter
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.losses import (
    LayerLoss,
    LoadBalanceLoss,
    SparseGatingLoss,
    SquaredBalanceLoss,
)
from dynamic_dino.moe.part_router import PartRouter
from dynamic_dino.moe.routers import SoftmaxRouter
from dynamic_dino.moe.routing import Routing
from dynamic_dino.moe.statistics import RoutingStatistics
from dynamic_dino.moe.top_any import TopAnyRouter
from lib import ablations_page
from lib.detectors import ROOT
from lib.provenance import provenance, results_folder, write_json
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from tqdm import tqdm

RECIPE = "configs/pretrain/nano_glyphs.py"
DIM, LAYERS, BATCH = 64, 3, 128
WIDTHS = (0, 16, 32, 64, 128, 256, 512)
BASE = 64
FREQUENCIES = {"rare": "r", "common": "c", "frequent": "f"}


# ---- data ---------------------------------------------------------------------------------------


@dataclass
class Glyphs:
    """Features at the centres of objects [n, C], and which names they have [n]."""

    x: Tensor
    y: Tensor


def read(split: str, cache: FeatureCache) -> Glyphs:
    """All objects of a split."""
    rows, labels = [], []
    for record in load_datasets(f"glyphs_{split}"):
        features = cache.load(record)
        for annotation in record["annotations"]:
            mode = annotation["bbox_mode"]
            x0, y0, x1, y1 = BoxMode.convert(annotation["bbox"], mode, BoxMode.XYXY_ABS)
            u, v = (x0 + x1) / 2 / cache.canvas, (y0 + y1) / 2 / cache.canvas
            levels = [features[name] for name in sorted(features)]
            cells = [f[:, int(v * f.shape[1]), int(u * f.shape[2])] for f in levels]
            rows.append(torch.cat(cells))
            labels.append(annotation["category_id"])
    return Glyphs(torch.stack(rows).float(), torch.tensor(labels))


def load_data() -> tuple[Glyphs, Glyphs]:
    """Training and test objects, normalised; their features are cached where they aren't yet."""
    folders = {split: dataset_root() / f"glyphs/features/{split}" for split in ("train", "test")}
    try:
        caches = {split: FeatureCache(folder) for split, folder in folders.items()}
    except (FileNotFoundError, ValueError):
        overrides = [
            f"dataloader.train.mapper.features={folders['train']}",
            f"dataloader.test.val.mapper.features={folders['test']}",
        ]
        cache_features(load_config(ROOT / RECIPE, overrides))
        caches = {split: FeatureCache(folder) for split, folder in folders.items()}
    train, test = read("train", caches["train"]), read("val", caches["test"])
    mean, deviation = train.x.mean(0), train.x.std(0) + 1e-3
    for part in (train, test):
        part.x = (part.x - mean) / deviation
    return train, test


@torch.no_grad()
def name_embeddings(names: list[str]) -> Tensor:
    """MiniLM's embedding of each name, not normalised [N, 384]."""
    spec = load_config(ROOT / RECIPE).model.text_encoder.model
    encoder = TextEncoder(spec, dim=384, frozen=True, pooled=True).eval()
    encoder.proj.weight.copy_(torch.eye(384))
    return encoder([Prompt.from_phrases(names)]).tokens[0].clone()


# ---- model --------------------------------------------------------------------------------------


class Memory(nn.Module):
    """Features [n, C] -> logits of all names [n, N], and a routing per layer of experts."""

    def __init__(self, channels: int, names: Tensor, ffn: Callable[[], nn.Module | None]) -> None:
        super().__init__()
        self.input, self.input_norm = nn.Linear(channels, DIM), nn.LayerNorm(DIM)
        self.text, self.text_norm = nn.Linear(names.shape[1], DIM), nn.LayerNorm(DIM)
        self.head = ContrastiveHead(DIM)
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(LAYERS))
        self.ffn = nn.ModuleList(m for m in (ffn() for _ in range(LAYERS)) if m is not None)
        self.register_buffer("names", names, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Routing]]:
        x = self.input_norm(self.input(x))[None]
        routings = []
        for ffn, norm in zip(self.ffn, self.norms, strict=False):
            x, routing = ffn(x, None, norm)
            routings += [routing] if routing is not None else []
        text = self.text_norm(self.text(self.names))[None]
        mask = torch.ones(text.shape[:2], dtype=torch.bool)
        return self.head(x, text, mask)[0], routings


def dense(width: int, widen: bool = False) -> Callable[[], nn.Module | None]:
    return lambda: FeedForward(DIM, width, widen=widen) if width else None


def softmax(
    experts: int = 16, top_k: int = 2, init_experts: bool = True, **options
) -> Callable[[], nn.Module]:
    return lambda: MoEFeedForward(
        DIM, BASE, SoftmaxRouter(DIM, experts, top_k, **options), init_experts=init_experts
    )


def by_router(router: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: MoEFeedForward(DIM, BASE, router())


def part_by_part(experts: int, parts: int, std: float) -> Callable[[], nn.Module]:
    return by_router(lambda: PartRouter(DIM, experts, parts, std))


class RecordingRouter(SoftmaxRouter):
    """Its routings say from what they were made, for `ZLoss`."""

    def forward(self, tokens: Tensor, scene: Tensor | None = None) -> Routing:
        routing = super().forward(tokens, scene)
        routing.keys, routing.tokens = self.weight, tokens.flatten(0, 1).detach()
        return routing


class ZLoss(LayerLoss):
    """The mean square of log sum exp of the logits, which keeps them small (ST-MoE,
    arXiv 2202.08906, equation 5)."""

    name = "loss_router_z"

    def of_layer(self, routing: Routing) -> Tensor:
        return (routing.tokens @ routing.keys.T).logsumexp(1).square().mean()


@dataclass
class Row:
    """A mixture, its router losses, and how it trains.

    adaptive   DynMoE's experts come and go
    router_lr  of the routers, over that of the experts
    drop       whether a copy of each layer, another one each step, is left out in training
    clusters   whether routers start from the centres of the base's tokens
    """

    title: str
    ffn: Callable[[], nn.Module | None]
    losses: list = field(default_factory=lambda: [LoadBalanceLoss(0.01)])
    adaptive: bool = False
    router_lr: float = 1.0
    drop: bool = False
    clusters: bool = False


def tuning_rows() -> dict[str, Row]:
    """Each with the paper's gate and rows drawn with N(0, 1), unless its title says otherwise."""
    flat = HierarchicalRouter
    rows = {
        "control": Row("dense", dense(BASE), []),
        "wide": Row("dense, as many parameters (512 units)", dense(512, widen=True), []),
        "x4": Row("x4-Top2", softmax(4)),
        "x8": Row("x8-Top2", softmax(8)),
        "x16": Row("x16-Top2", softmax()),
        "untied": Row("x16, router rows apart", softmax(tied=False)),
        "without_init": Row(
            "x16, random experts and router", softmax(tied=False, init_experts=False)
        ),
        "alpha_0.1": Row("x16, alpha 0.1", softmax(), [LoadBalanceLoss(0.1)]),
        "std_0.2": Row("x16, std 0.2", softmax(std=0.2)),
        "top1_x8": Row("x8-Top1, renormalised gate", softmax(8, 1, gate="renormalized")),
        "top4_x32": Row("x32-Top4, renormalised gate", softmax(32, 4, gate="renormalized")),
        "top1_learned": Row("x8-Top1, gradient to the router", part_by_part(8, 1, 1.0)),
        "dynmoe": Row(
            "DynMoE, 6 of at most 8 whole copies",
            by_router(lambda: TopAnyRouter(DIM, num_experts=8, initial_experts=6)),
            [SparseGatingLoss(0.01)],
            adaptive=True,
        ),
    }
    for std in (1.0, 0.02):
        tail, title = ("", "") if std == 1 else (f"_std_{std}", f", std {std}")
        for name, row in {
            "x16": Row("x16-Top2", softmax(std=std)),
            "alpha_0": Row("x16, random router that stays (alpha 0)", softmax(std=std), []),
            "renormalized": Row("x16, renormalised gate", softmax(gate="renormalized", std=std)),
            "straight_through": Row(
                "x16, straight-through gate", softmax(gate="straight_through", std=std)
            ),
            "parts": Row("x16, each part once (ours)", part_by_part(16, 2, std)),
            "himoe_instance": Row(
                "HI-MoE's flat router, 16 whole copies, K = 2",
                by_router(lambda std=std: flat(DIM, 16, 2, variant="instance", std=std)),
                [SquaredBalanceLoss(0.01)],
            ),
        }.items():
            rows[name + tail] = replace(row, title=row.title + title)
    return rows


def search_rows() -> dict[str, Row]:
    """What might make routing that is learnt better than routing that is random: what others do to
    train routers, or to start them. All cost a token what the dense FFN costs it."""
    known = tuning_rows()
    gate = "renormalized"
    taught = known[gate]
    parts = known["parts_std_0.02"]
    z_loss = by_router(lambda: RecordingRouter(DIM, gate=gate))
    return {name: known[name] for name in ("control", "wide", "alpha_0", "x16", gate)} | {
        "lr_10": replace(taught, title="its router's lr x 10", router_lr=10.0),
        "lr_0.1": replace(taught, title="its router's lr x 0.1", router_lr=0.1),
        "sharp": Row("its temperature 1/4 (std 4)", softmax(gate=gate, std=4.0)),
        "soft": Row("its temperature 5 (std 0.2)", softmax(gate=gate, std=0.2)),
        "z_loss": Row("it with z-loss 0.001", z_loss, [LoadBalanceLoss(0.01), ZLoss(0.001)]),
        "drop": replace(taught, title="it, a copy left out each step", drop=True),
        "clusters_taught": replace(taught, title="it, from k-means", clusters=True),
        "clusters": replace(known["x16"], title="x16-Top2, from k-means", clusters=True),
        "clusters_stay": replace(
            known["alpha_0"], title="x16, router of k-means that stays (alpha 0)", clusters=True
        ),
        "parts": parts,
        "parts_lr_10": replace(parts, title=f"{parts.title}, router's lr x 10", router_lr=10.0),
        "parts_lr_0.1": replace(parts, title=f"{parts.title}, router's lr x 0.1", router_lr=0.1),
        "parts_clusters": replace(
            known["parts"], title="x16, each part once, from k-means", clusters=True
        ),
    }


# ---- training -----------------------------------------------------------------------------------


def train(
    model: Memory, data: Glyphs, steps: int, lr: float, seed: int, row: Row | None = None
) -> None:
    """AdamW, cosine; which objects a step sees follows from the seed alone."""
    row = row or Row("", dense(BASE), [])
    free = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(free.values())
    groups = [
        {"params": [p for n, p in free.items() if (".router." in n) == router], "lr": rate}
        for router, rate in ((False, lr), (True, lr * row.router_lr))
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    adaptive = AdaptiveExperts(model) if row.adaptive else None
    routers = [m.router for m in model.modules() if isinstance(m, MoEFeedForward)]
    model.train()
    for step in range(steps):
        batch = torch.randint(len(data.y), (BATCH,), generator=order)
        for router in routers if row.drop else ():
            copy_of = torch.randint(router.num_experts // router.parts, (), generator=order)
            router.drop(*range(copy_of * router.parts, (copy_of + 1) * router.parts))
        logits, routings = model(data.x[batch])
        loss = F.cross_entropy(logits, data.y[batch])
        loss = loss + sum(term(routings) for term in row.losses)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if adaptive:
            adaptive.record(routings)
            if (step + 1) % 100 == 0 and step + 1 < steps:
                adaptive.adapt(optimizer)
    for router in routers:
        router.drop()


@torch.no_grad()
def score(model: Memory, data: Glyphs, frequency: list[str]) -> dict:
    """Accuracies in percent, and what the routers did."""
    logits, routings = model.eval()(data.x)
    right = (logits.argmax(1) == data.y).float()
    tier = np.array(frequency)[data.y.numpy()]
    found = {"all": 100 * float(right.mean())}
    for title, letter in FREQUENCIES.items():
        found[title] = 100 * float(right[torch.from_numpy(tier == letter)].mean())
    statistics = RoutingStatistics()
    if routings:
        statistics.update(routings)
    return {"scores": found, "routing": statistics.summary()}


@torch.no_grad()
def start_from_clusters(model: Memory, base: Memory, data: Glyphs, seed: int) -> None:
    """A router's row points at the centre of a cluster of the tokens that reach its layer in the
    base: k-means of their directions. Rows are as long as those of N(0, 1), and the parts of a copy
    share theirs."""
    tokens: list[Tensor] = []
    hooks = [
        ffn.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0][0]))
        for ffn in base.ffn
    ]
    base.eval()(data.x[:4096])
    for hook in hooks:
        hook.remove()
    for ffn, x in zip(model.ffn, tokens, strict=True):
        router = ffn.router
        copies = router.num_experts // router.parts
        centres, _ = kmeans2(F.normalize(x).numpy(), copies, minit="++", seed=seed)
        rows = DIM**0.5 * F.normalize(torch.from_numpy(centres).float())
        router.weight.copy_(rows.repeat_interleave(router.parts, 0))


def tuned(base: Memory, row: Row, channels: int, data: Glyphs, steps: int, seed: int) -> Memory:
    """The base with its FFNs replaced by the row's, which alone train on."""
    torch.manual_seed(seed)
    model = Memory(channels, base.names, row.ffn)
    model.load_state_dict(copy.deepcopy(base.state_dict()))
    if row.clusters:
        start_from_clusters(model, base, data, seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("ffn."))
    train(model, data, steps, 1e-3, seed, row)
    return model


def run(
    seed: int, options: argparse.Namespace, data: Glyphs, test: Glyphs, names: Tensor
) -> dict[str, dict]:
    """{"width", "tuning"} -> row -> its scores and routing with this seed."""
    frequency, channels = get_metadata("glyphs_train").frequency, data.x.shape[1]
    found: dict[str, dict] = {"width": {}, "tuning": {}}
    known = search_rows() if options.search else tuning_rows()
    rows = {name: row for name, row in known.items() if name in options.rows}
    widths = WIDTHS if rows.keys() == tuning_rows().keys() else [BASE]
    with tqdm(total=len(widths) + len(rows), desc=f"seed {seed}", unit="run") as progress:
        for width in widths:
            torch.manual_seed(seed)
            model = Memory(channels, names, dense(width))
            train(model, data, options.steps, 2e-3, seed)
            found["width"][f"{width} units"] = score(model, test, frequency)
            if width == BASE:
                base = model
            progress.update()
        for row in rows.values():
            model = tuned(base, row, channels, data, options.tuning, seed)
            found["tuning"][row.title] = score(model, test, frequency)
            progress.update()
    return found


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=800, help="of the base")
    parser.add_argument("--tuning", type=int, default=500, help="steps of MoE-Tuning")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=tuning_rows() | search_rows(),
        help="of the tuning, the control among them; with less than all no widths are trained",
    )
    parser.add_argument("--search", action="store_true", help="the rows of the search instead")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="default: in benchmarks/results/cpu")
    options = parser.parse_args()
    everything = list(search_rows() if options.search else tuning_rows())
    options.rows = options.rows or everything
    name = "name_memory_search" if options.search else "name_memory"
    options.json = options.json or results_folder() / f"{name}.json"
    torch.set_num_threads(options.threads)
    settings = {"steps": options.steps, "tuning": options.tuning, "batch": BATCH}
    if options.search or len(options.rows) < len(everything):
        settings["rows"] = options.rows
    report = provenance(("torch", "timm", "transformers", "scipy")) | {"settings": settings}
    report["seeds"] = {}
    if options.json.is_file() and (old := json.loads(options.json.read_text())):
        if old["settings"] != settings:
            raise SystemExit(f"{options.json} is of {old['settings']}: delete it to start anew")
        report["seeds"] = old["seeds"]
    todo = [seed for seed in options.seeds if str(seed) not in report["seeds"]]
    if todo:
        data, test = load_data()
        names = name_embeddings(get_metadata("glyphs_train").thing_classes)
    for seed in todo:
        found = run(seed, options, data, test, names)
        report["seeds"][str(seed)] = found
        write_json(options.json, report)
    ablations_page.main()


if __name__ == "__main__":
    main()
