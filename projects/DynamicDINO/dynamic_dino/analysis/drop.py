"""What a model loses without one of its experts (expert-drop ablation)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from torch import nn
from tqdm import tqdm

from .collect import Collection, collect
from .expert_ap import subset_ap
from .layers import moe_layers
from .objects import objects_of


@dataclass
class Drop:
    """AP in percent by subset (see `expert_ap`) without this expert of this layer, the change from
    the whole model, and the share of the layer's slots that the expert had."""

    layer: str
    expert: int
    load: float
    ap: dict[str, float]
    change: dict[str, float]


@contextmanager
def without_experts(model: nn.Module, layer: str, experts: Sequence[int]) -> Iterator[None]:
    """No token gets these experts of a MoE layer (a name of `moe_layers`) for a while: each takes
    its next best ones."""
    router = moe_layers(model)[layer].router
    before = router.dropped
    router.drop(*experts)
    try:
        yield
    finally:
        router.drop(*before)


def drop_experts(
    model: nn.Module,
    make_loader: Callable[[], Iterable[list[dict]]],
    dataset: str,
    layers: Sequence[str],
) -> tuple[dict[str, float], list[Drop]]:
    """Evaluates the model whole and without each single expert of these layers, in turn.

    Args:
        make_loader: of the images to evaluate on, the same ones each time.

    Returns the AP of the whole model by subset, and one `Drop` for each expert that is active.

    Raises:
        ValueError: a router that doesn't heed `dropped`.
    """
    whole = collect(model, make_loader(), dataset, f"{dataset}, all experts")
    reference = _ap(whole)
    loads = {layer.name: layer.load for layer in whole.layers}
    active = {name: _active(layer.router) for name, layer in moe_layers(model).items()}
    todo = [(layer, expert) for layer in layers for expert in active[layer]]
    drops = []
    for layer, expert in tqdm(todo, f"{dataset}, without one expert", unit="expert", leave=False):
        with without_experts(model, layer, [expert]):
            found = collect(model, make_loader(), dataset, "")
        left = next(c.load[expert] for c in found.layers if c.name == layer)
        if left:
            router = type(moe_layers(model)[layer].router).__name__
            raise ValueError(
                f"{router} gave expert {expert} to {left} tokens although it was dropped: its "
                "forward must leave out the experts of Router.masked"
            )
        ap = _ap(found)
        change = {k: ap[k] - reference[k] for k in ap if reference[k] >= 0}
        share = loads[layer][expert] / max(loads[layer].sum(), 1)
        drops.append(Drop(layer, expert, float(share), ap, change))
    return reference, drops


def _ap(collection: Collection) -> dict[str, float]:
    objects = objects_of(collection)
    everything = np.ones(len(collection.predictions), bool), np.ones(len(objects), bool)
    return subset_ap(collection, objects, *everything)[0]


def _active(router: nn.Module) -> list[int]:
    active = getattr(router, "active", None)
    if active is None:
        return list(range(router.num_experts))
    return active.nonzero().flatten().tolist()
