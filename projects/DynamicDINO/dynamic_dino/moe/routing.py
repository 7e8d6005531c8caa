"""`Routing`: what a router decided, the one value that losses, statistics and analysis read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Fields with one row for each token, and fields that are the same for all tokens of a layer.
PER_TOKEN = ("expert_ids", "gates", "probs", "scene_probs", "scene_routes", "tokens")
OF_LAYER = ("keys", "active", "mean_outputs", "parts")


@dataclass
class Routing:
    """Which experts each token uses. T tokens, K slots, E experts.

    expert_ids    int32 [T, K], -1 marks an empty slot
    gates         float [T, K], weight of each slot, 0 where empty; None: 1 in every filled slot
    probs         float [T, E], what the router thinks of every expert: a distribution, or the
                  scores of a top-any router
    blocks        int32, the slots of each block of tokens sorted by expert, as the router's kernel
                  leaves them for `expert_ffn`; None if there are none for just these tokens

    What only some routers and layers tell, else None:

    scene_probs   float [T, R], the distribution over R scene routes of the token's image
    scene_routes  int32 [T, S], the routes that its experts were chosen from, best first
    tokens        float [T, D], what was routed, without gradient; in training only
    keys          float [E, D], the experts' representations, with gradient; in training only
    active        bool [E], False for experts that are switched off
    mean_outputs  float [E, D], each expert's mean output for tokens of its own, with gradient, 0
                  where it has none; in training only
    parts         how many parts a copy of the dense FFN is cut into, one expert each: 1 where
                  experts are whole copies; None: as many as there are slots (Dynamic-DINO)
    """

    expert_ids: Tensor
    gates: Tensor | None
    probs: Tensor
    blocks: Tensor | None = None
    scene_probs: Tensor | None = None
    scene_routes: Tensor | None = None
    tokens: Tensor | None = None
    keys: Tensor | None = None
    active: Tensor | None = None
    mean_outputs: Tensor | None = None
    parts: int | None = None

    @property
    def num_experts(self) -> int:
        return self.probs.shape[-1]

    @classmethod
    def cat(cls, routings: Sequence[Routing]) -> Routing:
        """The tokens of several forward passes through one layer, in order."""
        layer = {name: getattr(routings[-1], name) for name in OF_LAYER}
        return cls(**_map_tokens(lambda *rows: torch.cat(rows), *routings), **layer)

    def slice_tokens(self, batch: int, start: int) -> Routing:
        """Drops the first `start` tokens of each of `batch` images, e.g. denoising queries."""
        rows = _map_tokens(lambda x: x.unflatten(0, (batch, -1))[:, start:].flatten(0, 1), self)
        return Routing(**rows, **{name: getattr(self, name) for name in OF_LAYER})


def _map_tokens(function: Callable[..., Tensor], *routings: Routing) -> dict[str, Any]:
    """function of each field with one row for each token; None where it isn't told."""
    fields = {name: [getattr(r, name) for r in routings] for name in PER_TOKEN}
    return {name: None if rows[0] is None else function(*rows) for name, rows in fields.items()}
