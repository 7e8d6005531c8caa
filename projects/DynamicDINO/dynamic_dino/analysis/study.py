"""What there is to see of one model, and of several."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from ..data.datasets import load_datasets
from ..engine.checkpointing import read_metrics
from ..files import write_text
from ..serving.inference import load_model
from .collect import Collection, collect
from .drop import drop_experts
from .expert_ap import expert_table
from .expert_figures import drop_figure, expert_table_figure, names_figures
from .figure import Section, slug
from .images import loader_of, test_datasets
from .layers import moe_layers
from .objects import objects_of
from .pictures import before_after, token_pictures
from .pooled import pooled
from .report import write_report
from .routing_figures import (
    coselection_figure,
    entropy_figure,
    load_figure,
    partners_figure,
    spread_figure,
    stability_figure,
)
from .summary import side_by_side, summary
from .top_any_figures import top_any_figures
from .training import training_curves


@dataclass
class StudiedModel:
    """A model to look at: what `load_model` takes. `run`: the folder of its training run."""

    title: str
    model: str
    weights: str | None = None
    run: Path | None = None


@dataclass
class Options:
    """What `analyse` does.

    datasets      registered names; empty: the first that the recipe tests on
    pools         title -> registered names that are counted as one
    against       the model of the pictures before and after
    max_images    of each data set; None: all
    names         what images are asked for, see `TestMapper`; None: as the recipe does, or "all"
    drop          drop every single expert of the "last" decoder layer, or of "all" layers
    drop_images   how many images each of these evaluations looks at
    """

    datasets: list[str] = field(default_factory=list)
    pools: dict[str, list[str]] = field(default_factory=dict)
    against: StudiedModel | None = None
    max_images: int | None = None
    names: str | int | None = None
    drop: str | None = None
    drop_images: int = 200
    batch_size: int = 8
    device: str | None = None


def analyse(studied: list[StudiedModel], options: Options, output: str | Path) -> Path:
    """Writes a report on one model, or on several runs, into the folder `output`: report.html,
    every figure as PNG, its numbers as CSV, and numbers.json. Returns the page.

    Raises FileNotFoundError or ValueError naming what is wrong.
    """
    collections: dict[str, dict[str, Collection]] = {}  # data set -> model -> what it did
    pools: dict[str, dict[str, Collection]] = {}  # the same of pools
    numbers: dict[str, dict[str, dict[str, float]]] = {}
    parts: list[Section] = []
    datasets, other = options.datasets, options.against
    for dataset in [*datasets, *(name for names in options.pools.values() for name in names)]:
        load_datasets(dataset)  # what is wrong with it shows now, not after the first data set
    before = load_model(other.model, other.weights, options.device) if other else None
    for one in studied:
        model, cfg = load_model(one.model, one.weights, options.device)
        if not moe_layers(model):
            raise ValueError(
                f"{one.title} has no MoE layer, so there is nothing to see of its experts: "
                "name a MoE checkpoint, and a dense one with --against"
            )
        datasets = datasets or list(test_datasets(cfg))[:1]
        if not datasets:
            raise ValueError(f"the recipe of {one.title} tests on no data set: give --dataset")
        for dataset in datasets:
            prefix = _prefix(one.title, studied, dataset, datasets)
            collection, section, found = study(model, cfg, dataset, options, prefix)
            section.title = f"{one.title} on {dataset}"
            collections.setdefault(dataset, {})[one.title] = collection
            numbers.setdefault(dataset, {})[one.title] = found
            parts.append(section)
        for name, sets in options.pools.items():
            several = len(studied) > 1
            seen = {d: models[one.title] for d, models in collections.items()}
            whole, section = study_pool(model, cfg, name, sets, options, seen, one.title * several)
            section.title = f"{one.title} on {name}"
            pools.setdefault(name, {})[one.title] = whole
            parts.append(section)
    if before:
        parts += compare(studied[0].title, collections, *before, options)
    title = f"Experts of {', '.join(c.title for c in studied)}"
    text = " ".join(
        f"{dataset}: {len(next(iter(models.values())).files)} images."
        for dataset, models in (collections | pools).items()
    )
    sections = [*overview(studied, collections, numbers, pools), *parts]
    page = write_report(output, title, text, sections)
    write_text(page.with_name("numbers.json"), json.dumps(numbers, indent=1) + "\n")
    return page


def study(
    model: nn.Module, cfg: DictConfig, dataset: str, options: Options, prefix: str
) -> tuple[Collection, Section, dict[str, float]]:
    """All that one pass over a data set shows, and the drop ablation if it is asked for."""
    make_loader = _loaders(cfg, dataset, options, options.max_images)
    collection = collect(model, make_loader(), dataset)
    objects = objects_of(collection)
    rows = expert_table(collection, objects) if collection.decoder and len(objects) else []
    numbers = summary(collection, rows[0] if rows else None)
    figures = [
        side_by_side({dataset: {k: v for k, v in numbers.items() if ":" not in k}}, prefix),
        load_figure(collection, prefix),
        *top_any_figures(model, collection, prefix),
        coselection_figure(collection, prefix),
        partners_figure(collection, prefix),
        entropy_figure(collection, prefix),
    ]
    if rows:
        figures += expert_table_figure(rows, prefix)
        figures += names_figures(collection, objects, prefix)
    if collection.decoder and collection.names:
        figures.append(token_pictures(collection, prefix))
    if options.drop and not collection.names:
        raise ValueError(f"{dataset} has no classes, so there is no AP to lose: leave out --drop")
    if options.drop:
        fewer = min(options.drop_images, options.max_images or options.drop_images)
        layers = list(moe_layers(model))
        layers = layers if options.drop == "all" else layers[-1:]
        loaders = _loaders(cfg, dataset, options, fewer)
        figures.append(drop_figure(*drop_experts(model, loaders, dataset, layers), prefix))
    text = (
        f"{len(collection.files)} images, {len(objects)} objects, "
        f"{len(collection.predictions)} detections, {len(collection.layers)} MoE layers."
    )
    return collection, Section(dataset, text, [f for f in figures if f is not None]), numbers


def study_pool(
    model: nn.Module,
    cfg: DictConfig,
    name: str,
    sets: list[str],
    options: Options,
    seen: Mapping[str, Collection],
    title: str,
) -> tuple[Collection, Section]:
    """What the routings over several data sets together show; `max_images` is that of each set.
    `seen`: what the model did on some of them already."""
    loaders = {one: _loaders(cfg, one, options, options.max_images) for one in sets}
    whole = pooled(
        name, (seen.get(one) or collect(model, make(), one) for one, make in loaders.items())
    )
    prefix = slug(title, name)
    figures = [
        load_figure(whole, prefix),
        coselection_figure(whole, prefix),
        partners_figure(whole, prefix),
    ]
    text = f"{len(whole.files)} images of {len(sets)} data sets, counted as one."
    return whole, Section(name, text, figures)


def compare(
    title: str,
    collections: Mapping[str, Mapping[str, Collection]],
    model: nn.Module,
    cfg: DictConfig,
    options: Options,
) -> list[Section]:
    """Pictures of what a model found beside what `model`, `options.against`, finds."""
    other, sections = options.against, []
    for dataset, models in collections.items():
        after = models[title]
        loaders = _loaders(cfg, dataset, options, options.max_images)
        before = collect(model, loaders(), dataset, f"{dataset}, {other.title}")
        prefix = dataset if len(collections) > 1 else ""
        figure = before_after(before, after, objects_of(after), (other.title, title), prefix)
        if figure is not None:
            name = f"{title} against {other.title} on {dataset}"
            sections.append(Section(name, figures=[figure]))
    return sections


def overview(
    studied: list[StudiedModel],
    collections: Mapping[str, Mapping[str, Collection]],
    numbers: Mapping[str, Mapping[str, dict[str, float]]],
    pools: Mapping[str, Mapping[str, Collection]],
) -> list[Section]:
    """What concerns several runs or data sets, and training."""
    figures = []
    several = len(collections) > 1
    for dataset, models in collections.items() if len(studied) > 1 else ():
        prefix = dataset if several else ""
        figures.append(side_by_side(numbers[dataset], prefix))
        if len({tuple(len(layer.load) for layer in c.layers) for c in models.values()}) == 1:
            figures.append(spread_figure(models, prefix))
    if len(collections) + len(pools) > 1:
        for one in studied:
            prefix = one.title if len(studied) > 1 else ""
            of_model = [models[one.title] for models in (*collections.values(), *pools.values())]
            figures.append(stability_figure(of_model, prefix))
    logs = {c.title: read_metrics(c.run / "metrics.json") for c in studied if c.run}
    figures.append(training_curves(logs))
    figures = [f for f in figures if f is not None]
    return [Section("Overview", figures=figures)] if figures else []


def _loaders(
    cfg: DictConfig, dataset: str, options: Options, max_images: int | None
) -> Callable[[], Iterable[list[dict]]]:
    names = options.names or test_datasets(cfg).get(dataset, "all")
    return loader_of(cfg, dataset, names, max_images, options.batch_size)


def _prefix(title: str, studied: list, dataset: str, datasets: list[str]) -> str:
    return slug(title if len(studied) > 1 else "", dataset if len(datasets) > 1 else "")
