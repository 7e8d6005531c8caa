"""One pass of a model over a data set, and what all figures need of it.

Only what the model returns is read: its detections, which query each of them is, and its routings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..data.datasets import get_metadata
from ..data.ground_truth import ground_truth
from ..engine.evaluate import adjusted
from ..evaluation.coco import read_ground_truth
from ..evaluation.evaluator import category_ids_of, predictions_of
from ..evaluation.predictions import DatasetPredictions
from ..moe.routing import Routing
from ..moe.statistics import RoutingStatistics, normalised_entropy
from .layers import moe_layers

EMPTY = -1


@dataclass
class LayerCounts:
    """What the tokens of one MoE layer did, all together. E experts, R scene routes.

    name      "decoder 0"; tokens of a decoder layer are queries
    load      int64 [E], tokens that took the expert
    pairs     int64 [E, E], tokens that took both; symmetric, zero on the diagonal
    routes    int64 [R, E], tokens that took the expert in images whose most probable scene route is
              r; None without a scene router
    named     what the routes are called, if there are any
    entropy   mean over tokens of the router's entropy, 1 = every expert is as probable as any; None
              where the router gives no distribution (top-any)
    """

    name: str
    load: np.ndarray | int = 0
    pairs: np.ndarray | int = 0
    routes: np.ndarray | None = None
    named: Sequence[str] = ()
    tokens: int = 0
    entropy: float | None = None

    def add(self, routing: Routing, ids: np.ndarray) -> None:
        """ids: those of the routing, int [T, K] on the CPU"""
        chosen = np.zeros((len(ids), routing.num_experts + 1), np.float32)
        chosen[np.arange(len(ids))[:, None], ids] = 1  # the last column is for empty slots
        chosen = chosen[:, :-1]
        pairs = (chosen.T @ chosen).astype(np.int64)
        load = pairs.diagonal().copy()
        np.fill_diagonal(pairs, 0)
        self.load, self.pairs = self.load + load, self.pairs + pairs
        if routing.scene_routes is not None:
            best = routing.scene_routes[:, 0].cpu().numpy()
            routes = np.zeros((routing.scene_probs.shape[1], routing.num_experts), np.int64)
            for route in np.unique(best):
                routes[route] = chosen[best == route].sum(0)
            self.routes = routes if self.routes is None else self.routes + routes
        if routing.active is None:
            mean = float(normalised_entropy(routing.probs).mean())
            before = (self.entropy or 0.0) * self.tokens
            self.entropy = (before + mean * len(ids)) / (self.tokens + len(ids))
        self.tokens += len(ids)


@dataclass
class Collection:
    """What a model did on a data set.

    layers       one for each MoE layer, the encoder's first
    statistics   `RoutingStatistics.summary`
    predictions  N detections; those of one image follow each other, best first
    experts      int16 [N, L, K], what the query of each detection took in the L MoE layers of the
                 decoder: in ascending order, then -1
    files        image id -> file, of the images seen
    truth        their ground truth, as `read_ground_truth` gives it; of a data set without classes
                 nothing, and no predictions either
    names        category id -> name
    """

    dataset: str
    layers: list[LayerCounts]
    statistics: list[dict]
    predictions: DatasetPredictions
    experts: np.ndarray
    files: dict[int | str, str]
    truth: dict
    names: dict[int, str] = field(default_factory=dict)

    @property
    def decoder(self) -> list[LayerCounts]:
        """The decoder's MoE layers, whose tokens are queries."""
        return [layer for layer in self.layers if layer.name.startswith("decoder")]


class Collector:
    """Takes a model's outputs batch by batch, and leaves them as they are.

    A detection costs 40 bytes and 2 for every expert of it, whatever else the model computes. Of a
    data set without classes (captions, referring expressions) only the routings are kept.

    Raises:
        ValueError: the model doesn't report all MoE layers.
    """

    def __init__(self, model: nn.Module, dataset: str) -> None:
        self.dataset = dataset
        classes = get_metadata(dataset).get("thing_dataset_id_to_contiguous_id")
        self.category_ids = category_ids_of(dataset) if classes else None
        self.layers = [
            LayerCounts(name, named=getattr(layer.router, "route_names", ()))
            for name, layer in moe_layers(model).items()
        ]
        self.statistics = RoutingStatistics()
        self.predictions: list[DatasetPredictions] = []
        self.experts: list[np.ndarray] = []
        self.files: dict[int | str, str] = {}

    def add(self, inputs: list[dict], outputs: list[dict]) -> None:
        """What `model(inputs)` returned."""
        routings = outputs[0].get("routings", [])
        if len(routings) != len(self.layers):
            raise ValueError(
                f"the model has {len(self.layers)} MoE layers, but returned {len(routings)} "
                "routings: its return_routings must be on, and every MoE layer must return its own"
            )
        if routings:
            self.statistics.update(routings)
        ids = [routing.expert_ids.cpu().numpy() for routing in routings]
        for layer, routing, chosen in zip(self.layers, routings, ids, strict=True):
            layer.add(routing, chosen)
        of_queries = [
            sorted_ids(chosen)
            for layer, chosen in zip(self.layers, ids, strict=True)
            if layer.name.startswith("decoder")
        ]
        for sample, output in zip(inputs, outputs, strict=True):
            self.files[sample["image_id"]] = sample.get("file_name", "")
            if self.category_ids is None:
                continue
            found = output["instances"]
            where = f"{sample.get('file_name')} of {self.dataset}"
            self.predictions.append(predictions_of(sample, found, self.category_ids, where))
            if of_queries:
                rows = found.queries.cpu().numpy()
                self.experts.append(stack_padded([chosen[rows] for chosen in of_queries]))

    def result(self) -> Collection:
        metadata = get_metadata(self.dataset)
        truth, names = {"images": [], "annotations": [], "categories": []}, {}
        if self.category_ids is not None:
            truth = read_ground_truth(ground_truth(self.dataset))
            truth["images"] = [i for i in truth["images"] if i["id"] in self.files]
            truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in self.files]
            names = dict(zip(self.category_ids, metadata.thing_classes, strict=True))
        predictions = DatasetPredictions.cat(self.predictions)
        empty = np.zeros((len(predictions), 0, 0), np.int16)
        return Collection(
            self.dataset,
            self.layers,
            self.statistics.summary(),
            predictions,
            np.concatenate(self.experts) if self.experts else empty,
            self.files,
            truth,
            names,
        )


def collect(
    model: nn.Module, loader: Iterable[list[dict]], dataset: str, title: str | None = None
) -> Collection:
    """Runs the model, as it is, once over the batches of a registered data set.

    Args:
        loader: as `build_test_loader` makes it.
        title: of the progress bar; default: the data set's name. "" shows none.
    """
    collector = Collector(model, dataset)
    settings = {"return_routings": True} if collector.layers else {}
    title = dataset if title is None else title
    with torch.no_grad(), adjusted(model, settings):
        for inputs in tqdm(loader, title, unit="batch", disable=not title, leave=False):
            collector.add(inputs, model(inputs))
    return collector.result()


def sorted_ids(ids: np.ndarray) -> np.ndarray:
    """int16 [T, K], every row in ascending order, its empty slots behind"""
    last = np.iinfo(np.int16).max
    ids = np.sort(np.where(ids < 0, last, ids), 1)
    return np.where(ids == last, EMPTY, ids).astype(np.int16)


def stack_padded(layers: list[np.ndarray]) -> np.ndarray:
    """Of every layer [N, its K] -> [N, L, the largest K]"""
    most = max(ids.shape[1] for ids in layers)
    padded = [
        np.pad(ids, ((0, 0), (0, most - ids.shape[1])), constant_values=EMPTY) for ids in layers
    ]
    return np.stack(padded, 1)
