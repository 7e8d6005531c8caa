#!/usr/bin/env python
"""Does HI-MoE's scene router send different scenes to different experts, more than one that has
learnt nothing does?

    python benchmarks/scenes.py configs/himoe/nano_x16_photos.py output/himoe/nano_x16_photos --save
    python benchmarks/scenes.py RECIPE RUN RUN --sets photos_coco_val photos_groceries_val mine:val

A scene is a data set: street, shelf, tarmac. As many images of each are asked for the same names,
since the text is mixed into what the scene router sees. For every MoE layer of the decoder: which
routes and experts each set takes, the normalised mutual information of route and set and of expert
and set, and how often the set can be told from the routes alone. Beside each the same by chance
(sets permuted over images) and, since random projections of features tell sets apart, too, of scene
routers that have learnt nothing, in the same detector: the one that the run started from, --draws
that are drawn anew, and --random more on the features that the detector shows them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from dynamic_dino.analysis.images import loader_of
from dynamic_dino.analysis.layers import moe_layers
from dynamic_dino.checkpoint.weights import load_checkpoint
from dynamic_dino.config import build, load_config
from dynamic_dino.data.datasets import get_metadata, load_datasets
from dynamic_dino.engine.trainer import seed_everything
from dynamic_dino.modeling.detector import OpenVocabularyDetector
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.moe.hierarchical import HierarchicalRouter
from dynamic_dino.moe.routing import Routing
from dynamic_dino.serving.inference import load_model
from lib import scene_statistics as statistics
from lib.figures import save_figure
from lib.options import add_machine, add_output, new_parser, place_output, use_threads
from lib.provenance import provenance, settings, write_json
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm import tqdm

NAME = "scenes"
PACKAGES = ("torch", "timm", "numpy")
SETS = (
    "photos_coco_val",
    "photos_animals25_val",
    "photos_groceries_val",
    "photos_airport_debris_val",
    "stamps_val",
)


@dataclass
class Routes:
    """What the L decoder layers of one detector did with N images.

    routes   int [N, L, S], the routes of an image, best first
    experts  float [N, L, E], how many of its queries took each expert
    """

    routes: np.ndarray
    experts: np.ndarray


def scene_routers(model: OpenVocabularyDetector) -> dict[str, HierarchicalRouter]:
    """Those of the decoder's layers, by the layers' names.

    Raises ValueError if a layer has no scene router of its own.
    """
    found = {
        name: layer.router
        for name, layer in moe_layers(model).items()
        if name.startswith("decoder") and hasattr(layer.router, "scene_weight")
    }
    if len(found) < len(model.decoder.layers):
        raise ValueError(
            "not every layer of the decoder has a scene router of its own: name a run of a recipe "
            "of HI-MoE, such as configs/himoe/nano_x16_photos.py, without shared_scene or "
            "instance_only"
        )
    return found


def drawn_anew(routers: Iterable[HierarchicalRouter], generator: torch.Generator) -> list[Tensor]:
    """Weights [R, D] of scene routers that have learnt nothing."""
    return [
        torch.randn(router.scene_weight.shape, generator=generator).to(router.scene_weight)
        * router.std
        for router in routers
    ]


def weights_at_the_start(recipe: str, run: DictConfig) -> list[Tensor]:
    """Those of the scene routers before the first iteration of a run of this recipe, of which the
    run's own config.yaml is no substitute: modules are built, and their weights drawn, in the order
    of the recipe, and config.yaml is in that of the alphabet."""
    names = ("seed", "init_checkpoint")
    cfg = load_config(recipe, [f"train.{name}={run.train[name]}" for name in names])
    seed_everything(cfg.train.seed)
    model = build(cfg.model, "model")
    load_checkpoint(model, cfg.train.init_checkpoint, cfg.train.init_except)
    return [router.scene_weight.data for router in scene_routers(model).values()]


@torch.no_grad()
def route(
    model: OpenVocabularyDetector,
    batches: Iterable[list[dict]],
    prompt: Prompt,
    weights: Sequence[Sequence[Tensor]],
) -> tuple[np.ndarray, list[Routes]]:
    """The scenes, float [N, D], and what the decoder does with each of the `weights` of its scene
    routers; all that comes before it runs once. The model keeps its own weights."""
    routers = list(scene_routers(model).values())
    own = [router.scene_weight.data for router in routers]
    scenes: list[Tensor] = []
    found: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in weights]
    for batch in batches:
        features, masks = model.image_features(batch)
        text = model.text_encoder([prompt] * len(batch))
        memory, text, _ = model.enhancer(features, masks, text)
        queries, selection = model.query_selection(memory, text)
        memory = replace(memory, scene=model.scene(memory, selection))
        scenes.append(memory.scene.cpu())
        for (routes, experts), drawn in zip(found, weights, strict=True):
            set_weights(routers, drawn)
            routings = model.decoder(queries, memory, text, None).routings
            routes.append(torch.stack([routes_of(r, len(batch)) for r in routings], 1))
            experts.append(torch.stack([experts_of(r, len(batch)) for r in routings], 1))
        set_weights(routers, own)
    return torch.cat(scenes).numpy(), [
        Routes(torch.cat(routes).numpy(), torch.cat(experts).numpy()) for routes, experts in found
    ]


def set_weights(routers: Sequence[HierarchicalRouter], weights: Sequence[Tensor]) -> None:
    for router, weight in zip(routers, weights, strict=True):
        router.scene_weight.data = weight.to(router.scene_weight)


def routes_of(routing: Routing, images: int) -> Tensor:
    """int [B, S], best first"""
    return routing.scene_routes.unflatten(0, (images, -1))[:, 0].cpu()


def experts_of(routing: Routing, images: int) -> Tensor:
    """float [B, E]: how many queries of each image took each expert"""
    ids = routing.expert_ids.cpu().long().view(images, -1)
    return one_hot(ids, routing.num_experts).sum(1).double()


# ---- numbers ------------------------------------------------------------------------------------


def measure(
    found: Routes,
    names: Sequence[str],
    num_routes: int,
    kinds: np.ndarray,
    permutations: int,
    rng: np.random.Generator,
) -> dict:
    """Of each layer, routes and experts by set; and how often all layers' routes tell the set."""
    layers = []
    for i, name in enumerate(names):
        row: dict = {"layer": name}
        routes = np.eye(num_routes)[found.routes[:, i, 0]]
        for what, choices in (("routes", routes), ("experts", found.experts[:, i])):
            counts = statistics.table(choices, kinds)
            chance = statistics.information_by_chance(choices, kinds, permutations, rng)
            row[what] = {
                "information": statistics.normalised_information(counts),
                "by_chance": float(chance.mean()),
                "by_chance_97.5": float(np.quantile(chance, 0.975)),
                "shares": (counts / counts.sum(1, keepdims=True)).round(4).tolist(),
            }
        row["told_apart"] = statistics.told_apart(found.routes[:, i], kinds, rng)
        layers.append(row)
    shuffled = [
        statistics.told_apart(found.routes, rng.permutation(kinds), rng)
        for _ in range(permutations)
    ]
    return {
        "layers": layers,
        "told_apart": statistics.told_apart(found.routes, kinds, rng),
        "told_apart_by_chance": float(np.mean(shuffled)),
    }


def random_routers(
    scenes: np.ndarray,
    layers: int,
    num_routes: int,
    active: int,
    kinds: np.ndarray,
    times: int,
    rng: np.random.Generator,
) -> dict[str, list[float]]:
    """The scene routers of `times` decoders, drawn at random, on the scenes [N, D]: the information
    of the first layer's route, and how often all layers' routes tell the set."""
    information, told = [], []
    for _ in range(times):
        weights = rng.standard_normal((layers, num_routes, scenes.shape[1]))
        logits = np.einsum("nd,lrd->nlr", scenes, weights)
        routes = (-logits).argsort(-1, kind="stable")[..., :active]
        counts = statistics.table(np.eye(num_routes)[routes[:, 0, 0]], kinds)
        information.append(statistics.normalised_information(counts))
        told.append(statistics.told_apart(routes, kinds, rng))
    return {"information": information, "told_apart": told}


def place_among(value: float, others: Sequence[float]) -> float:
    """The share of the others that are smaller; equal ones count half."""
    values = np.asarray(others)
    return float(((values < value) + 0.5 * (values == value)).mean())


def study(
    model: OpenVocabularyDetector,
    start: Sequence[Tensor],
    options: argparse.Namespace,
    batches: list[list[dict]],
    prompt: Prompt,
) -> dict:
    """All that is said of one model; `batches` have as many images of each set, set by set."""
    routers = scene_routers(model)
    first = next(iter(routers.values()))
    num_routes, active = first.pools.shape[0], first.active_routes
    generator = torch.Generator().manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    own = [router.scene_weight.data for router in routers.values()]
    drawn = [drawn_anew(routers.values(), generator) for _ in range(options.draws)]
    scenes, found = route(model, tqdm(batches, leave=False), prompt, [own, start, *drawn])
    kinds = np.repeat(np.arange(len(options.sets)), len(scenes) // len(options.sets))
    trained, before, *others = (
        measure(one, list(routers), num_routes, kinds, options.permutations, rng) for one in found
    )
    random = random_routers(scenes, len(routers), num_routes, active, kinds, options.random, rng)
    for i, row in enumerate(trained["layers"]):
        routes = row["routes"]
        routes["above_random"] = place_among(routes["information"], random["information"])
        same = found[0].routes[:, i, 0] == found[1].routes[:, i, 0]
        routes["as_at_the_start"] = float(same.mean())
        cosine = torch.cosine_similarity(own[i].flatten(), start[i].flatten().to(own[i]), 0)
        routes["weights_and_start"] = float(cosine)
    trained["told_apart_above_random"] = place_among(trained["told_apart"], random["told_apart"])
    return {
        "trained": trained,
        "start": before,
        "drawn": others,
        "random": random,
        "told_by_features": statistics.told_by_features(scenes, kinds, rng),
        "common_to_all": statistics.common_share(scenes),
    }


# ---- pictures and tables ------------------------------------------------------------------------


def title_of(dataset: str) -> str:
    """photos_coco_val, photos/indoor10:val -> coco, indoor10"""
    name = Path(dataset.partition(":")[0]).name
    return name.removeprefix("photos_").removesuffix("_val")


def plot(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    first = next(iter(report["runs"].values()))
    shown = {"trained": first["trained"], "at the start": first["start"]}
    shown["drawn anew"] = first["drawn"][0]
    sets = [title_of(name) for name in report["settings"]["sets"]]
    columns = len(first["trained"]["layers"]) + 1
    figure, axes = plt.subplots(
        len(shown), columns, figsize=(2.6 * columns + 1, 2.5 * len(shown)), squeeze=False
    )
    for row, (title, found) in zip(axes, shown.items(), strict=True):
        for axis, layer in zip(row, found["layers"], strict=False):
            shares = 100 * np.array(layer["routes"]["shares"])
            axis.imshow(shares, vmin=0, vmax=100, cmap="magma_r", aspect="auto")
            for (i, j), share in np.ndenumerate(shares):
                color = "white" if share > 50 else "black"
                axis.text(j, i, f"{share:.0f}", ha="center", va="center", color=color, fontsize=7)
            information = layer["routes"]["information"]
            axis.set_title(f"{layer['layer']}, {title}: {information:.2f}", fontsize=9)
            axis.set_xticks(range(shares.shape[1]))
            axis.set_yticks(range(len(sets)), sets if axis is row[0] else [""] * len(sets))
        row[0].set_ylabel("images of the set, %")
    for axis in axes[-1, :-1]:
        axis.set_xlabel("most probable route")
    for axis, key, title in (
        (axes[0, -1], "information", "information of route and set"),
        (axes[1, -1], "told_apart", "sets told from all routes, share"),
    ):
        runs = report["runs"].values()
        axis.hist([v for run in runs for v in run["random"][key]], 30, color="#b9c4d0")
        for kind, color in (("start", "#3b6fb6"), ("trained", "#d9822b")):
            for value in (v for run in runs for v in values_of(run[kind], key)):
                axis.axvline(value, color=color, linewidth=1.2)
        axis.set(title=title, yticks=[])
        axis.title.set_fontsize(9)
    kinds = ("trained", "#d9822b"), ("at the start", "#3b6fb6"), ("random routers", "#b9c4d0")
    handles = [plt.Line2D([], [], color=color, linewidth=3, label=kind) for kind, color in kinds]
    axes[-1, -1].legend(handles=handles, loc="upper left", fontsize=8)
    for axis in axes[2:, -1]:
        axis.set_axis_off()
    save_figure(figure, path)


def values_of(found: dict, key: str) -> list[float]:
    """Of a decoder, what `random_routers` has of random ones."""
    if key == "told_apart":
        return [found["told_apart"]]
    return [layer["routes"][key] for layer in found["layers"]]


def summary(name: str, run: dict) -> str:
    rows = [name]
    for row, before in zip(run["trained"]["layers"], run["start"]["layers"], strict=True):
        routes, experts = row["routes"], row["experts"]
        rows.append(
            f"  {row['layer']}: route {routes['information']:.3f} (at the start "
            f"{before['routes']['information']:.3f}, chance {routes['by_chance']:.3f}, above "
            f"{routes['above_random']:.0%} of random routers), expert {experts['information']:.3f} "
            f"(at the start {before['experts']['information']:.3f}, chance "
            f"{experts['by_chance']:.3f}); as at the start: {routes['as_at_the_start']:.0%} of the "
            f"routes, weights' cosine {routes['weights_and_start']:.2f}"
        )
    rows.append(
        f"  told apart by all routes {run['trained']['told_apart']:.0%}; at the start "
        f"{run['start']['told_apart']:.0%}, random routers "
        f"{np.mean(run['random']['told_apart']):.0%}, chance "
        f"{run['trained']['told_apart_by_chance']:.0%}, features {run['told_by_features']:.0%}"
    )
    return "\n".join(rows)


# ---- the script ---------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("recipe", help="what the runs are runs of")
    parser.add_argument("runs", nargs="+", metavar="run", help="their folders")
    parser.add_argument("--sets", nargs="+", default=[*SETS], metavar="SET", help="the scenes")
    parser.add_argument("--images", type=int, default=90, help="at most, of each set (%(default)s)")
    parser.add_argument("--names", metavar="SET", help="whose names are asked for: the first set's")
    parser.add_argument("--draws", type=int, default=3, help="in the detector (%(default)s)")
    parser.add_argument("--random", type=int, default=500, help="on its features (%(default)s)")
    parser.add_argument("--permutations", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn here")
    add_machine(parser)
    add_output(parser, plot=True)
    options = parser.parse_args(arguments)
    if len(options.sets) < 2:
        parser.error("--sets: name two or more, each a scene of its own")
    counts = (options.images, options.draws, options.random, options.permutations)
    if min(counts) < 1 or options.batch_size < 1:
        parser.error("--images, --draws, --random, --permutations and --batch-size are 1 or more")
    options.names = options.names or options.sets[0]
    place_output(options, NAME)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    use_threads(options)
    try:
        return run_all(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_all(options: argparse.Namespace) -> int:
    images = min(options.images, *(len(load_datasets(name)) for name in options.sets))
    prompt = Prompt.from_phrases(get_metadata(options.names).thing_classes)
    report = provenance(PACKAGES, options.device) | {"settings": settings(options)}
    report |= {"images": images, "runs": {}}
    for run in options.runs:
        model, cfg = load_model(run, device=options.device)
        scene_routers(model)  # one that has none is refused now
        loaders = (
            loader_of(cfg, name, "all", images, options.batch_size)() for name in options.sets
        )
        batches = [batch for loader in loaders for batch in loader]
        start = weights_at_the_start(options.recipe, cfg)
        found = study(model, start, options, batches, prompt)
        report["runs"][run] = found
        print(summary(run, found), flush=True)
        if options.json:
            write_json(options.json, report)
    if options.plot:
        plot(report, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
