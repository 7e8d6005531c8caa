"""How tokens use experts: load, entropy, and whether siblings stay together.

Expert e is part e % k of FFN copy e // k. A token that chose the k parts of one copy computes a
whole FFN ("siblings"); one that chose the same part twice lacks another ("same part").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .losses import expert_load
from .routing import Routing


class RoutingStatistics:
    """Adds up routings over batches; `summary` gives one row of numbers per MoE layer."""

    def __init__(self) -> None:
        self.counts: list[Tensor] = []  # per layer [E]
        self.sums: list[Tensor] = []  # per layer: tokens, sibling tokens, same-part tokens

    def update(self, routings: list[Routing]) -> None:
        if not self.counts:
            self.counts = [torch.zeros(r.num_experts, dtype=torch.long) for r in routings]
            self.sums = [torch.zeros(3, dtype=torch.long) for _ in routings]
        for i, routing in enumerate(routings):
            ids = routing.expert_ids.long().cpu()
            self.counts[i] += torch.bincount(ids.flatten() + 1, minlength=routing.num_experts + 1)[
                1:
            ]
            siblings, same_part = sibling_tokens(ids)
            self.sums[i] += torch.stack([torch.tensor(len(ids)), siblings.sum(), same_part.sum()])

    @classmethod
    def merged(cls, parts: list[RoutingStatistics]) -> RoutingStatistics:
        """The statistics of several processes together; one that saw no image adds nothing."""
        total = cls()
        for part in parts:
            if not part.counts:
                continue
            if not total.counts:
                total.counts = [torch.zeros_like(c) for c in part.counts]
                total.sums = [torch.zeros_like(s) for s in part.sums]
            for mine, its in zip(total.counts + total.sums, part.counts + part.sums, strict=True):
                mine += its
        return total

    def summary(self) -> list[dict[str, float | list[float]]]:
        """Per layer: load [E], load_entropy in [0, 1], siblings and same_part shares of tokens,
        and how many experts are rare (< 1% of the load) or dead (no token at all)."""
        rows = []
        for counts, (tokens, siblings, same_part) in zip(self.counts, self.sums, strict=True):
            load = counts.float() / counts.sum().clamp(min=1)
            rows.append(
                {
                    "load": load.tolist(),
                    "load_entropy": float(normalised_entropy(load)),
                    "siblings": float(siblings / tokens.clamp(min=1)),
                    "same_part": float(same_part / tokens.clamp(min=1)),
                    "rare_experts": int((load < 0.01).sum()),
                    "dead_experts": int((counts == 0).sum()),
                }
            )
        return rows


def sibling_tokens(ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids [T, K] -> bool [T]: all parts of one copy; bool [T]: some part chosen twice"""
    k = ids.shape[1]
    siblings = (ids // k == ids[:, :1] // k).all(1)
    parts = (ids % k).sort(1).values
    same_part = (parts[:, 1:] == parts[:, :-1]).any(1)
    return siblings, same_part


def normalised_entropy(load: Tensor) -> Tensor:
    """Entropy of a distribution over that of the even one: 1 = even, 0 = one expert does it all"""
    entropy = -(load * load.clamp(min=1e-12).log()).sum(-1)
    return entropy / math.log(max(load.shape[-1], 2))


def training_metrics(routings: list[Routing]) -> dict[str, Tensor]:
    """Scalars for the training log, per layer, from one batch's matching queries."""
    metrics = {}
    for i, routing in enumerate(routings):
        with torch.no_grad():
            load = expert_load(routing)
            siblings, same_part = sibling_tokens(routing.expert_ids)
            metrics[f"moe/layer{i}/load_entropy"] = normalised_entropy(load)
            metrics[f"moe/layer{i}/load_max"] = load.max()
            metrics[f"moe/layer{i}/dead_experts"] = (load == 0).float().sum()
            metrics[f"moe/layer{i}/siblings"] = siblings.float().mean()
            metrics[f"moe/layer{i}/same_part"] = same_part.float().mean()
    return metrics
