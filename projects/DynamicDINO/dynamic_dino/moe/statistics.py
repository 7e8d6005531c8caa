"""How tokens use experts: load, entropy, how many each takes, and whether siblings stay together.

Fine-grained expert e is part e % parts of FFN copy e // parts. A token that chose all parts of one
copy computes a whole FFN ("siblings"); one that chose the same part twice lacks another ("same
part"). Where experts are whole copies there are no siblings.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .losses import entropy, expert_counts, expert_load
from .routing import Routing

UNDEFINED = -1.0  # as in COCO's metrics; tables show a dash


class RoutingStatistics:
    """Adds up routings over batches; `summary` gives one row of numbers per MoE layer."""

    def __init__(self) -> None:
        self.counts: list[Tensor] = []  # per layer [E], slots of each expert
        self.taken: list[Tensor] = []  # per layer [K + 1], tokens with 0, 1, ... K experts
        self.sums: list[Tensor] = []  # per layer: sibling tokens, same-part tokens
        self.active: list[Tensor] = []  # per layer bool [E]
        self.parts: list[int] = []  # per layer

    def update(self, routings: list[Routing]) -> None:
        if not self.counts:
            self.counts = [torch.zeros(r.num_experts, dtype=torch.long) for r in routings]
            slots = [r.expert_ids.shape[1] for r in routings]
            self.taken = [torch.zeros(k + 1, dtype=torch.long) for k in slots]
            self.sums = [torch.zeros(2, dtype=torch.long) for _ in routings]
        self.active = [active_experts(r).cpu() for r in routings]
        self.parts = [parts_of(r) for r in routings]
        for i, routing in enumerate(routings):
            ids = routing.expert_ids.long().cpu()
            self.counts[i] += expert_counts(ids, routing.num_experts)
            self.taken[i] += torch.bincount((ids >= 0).sum(1), minlength=len(self.taken[i]))
            flags = sibling_tokens(ids, self.parts[i])
            self.sums[i] += torch.stack([flag.sum() for flag in flags])

    @classmethod
    def merged(cls, parts: list[RoutingStatistics]) -> RoutingStatistics:
        """The statistics of several processes together; one that saw no image adds nothing."""
        total = cls()
        for part in parts:
            if not part.counts:
                continue
            names = ("counts", "taken", "sums")
            if not total.counts:
                total.active, total.parts = part.active, part.parts
                for name in names:
                    setattr(total, name, [torch.zeros_like(t) for t in getattr(part, name)])
            for name in names:
                for mine, its in zip(getattr(total, name), getattr(part, name), strict=True):
                    mine += its
        return total

    def state(self) -> list[dict[str, Any]]:
        """All of it as plain data, one dict per layer; `of` gives the statistics back."""
        columns = (self.counts, self.taken, self.sums, self.active, self.parts)
        names = ("counts", "taken", "sums", "active", "parts")
        return [
            {
                name: v.tolist() if isinstance(v, Tensor) else v
                for name, v in zip(names, row, strict=True)
            }
            for row in zip(*columns, strict=True)
        ]

    @classmethod
    def of(cls, state: list[dict[str, Any]]) -> RoutingStatistics:
        result = cls()
        for layer in state:
            for name in ("counts", "taken", "sums", "active"):
                getattr(result, name).append(torch.tensor(layer[name]))
            result.parts.append(layer["parts"])
        return result

    def summary(self) -> list[dict[str, Any]]:
        """Per layer: load [E], load_entropy in [0, 1], siblings and same_part shares of tokens (-1
        where experts are whole copies), how many experts are active, and of those rare (< 1% of the
        load) or dead (no token at all); experts_per_token, and its distribution [K + 1]."""
        rows = []
        for layer, counts in enumerate(self.counts):
            load = counts.float() / counts.sum().clamp(min=1)
            on, taken = self.active[layer], self.taken[layer].float()
            tokens = taken.sum().clamp(min=1)
            siblings, same_part = (float(s / tokens) for s in self.sums[layer])
            whole = self.parts[layer] == 1 and len(taken) > 2
            rows.append(
                {
                    "load": load.tolist(),
                    "load_entropy": float(normalised_entropy(load, on)),
                    "siblings": UNDEFINED if whole else siblings,
                    "same_part": UNDEFINED if whole else same_part,
                    "active_experts": int(on.sum()),
                    "rare_experts": int((load[on] < 0.01).sum()),
                    "dead_experts": int((counts[on] == 0).sum()),
                    "experts_per_token": float((taken * torch.arange(len(taken))).sum() / tokens),
                    "experts_per_token_distribution": (taken / tokens).tolist(),
                }
            )
        return rows


def active_experts(routing: Routing) -> Tensor:
    """bool [E], True for the experts that are switched on: all, unless the routing says"""
    if routing.active is not None:
        return routing.active
    return torch.ones(routing.num_experts, dtype=torch.bool, device=routing.probs.device)


def parts_of(routing: Routing) -> int:
    """How many fine-grained experts make a copy of the dense FFN."""
    return routing.parts or routing.expert_ids.shape[1]


def sibling_tokens(ids: Tensor, parts: int | None = None) -> tuple[Tensor, Tensor]:
    """ids [T, K], -1 = empty -> bool [T]: the filled slots are the parts of one copy; bool [T]:
    some part was chosen twice. `parts` of a copy: K unless given."""
    parts = parts or ids.shape[1]
    filled = ids >= 0
    copy = torch.where(filled, ids // parts, -1)
    one_copy = ((copy == copy.amax(1, keepdim=True)) | ~filled).all(1)
    siblings = one_copy & (filled.sum(1) == parts)
    empty = -1 - torch.arange(ids.shape[1], device=ids.device)  # no two are the same part
    part = torch.where(filled, ids % parts, empty).sort(1).values
    return siblings, (part[:, 1:] == part[:, :-1]).any(1)


def normalised_entropy(load: Tensor, active: Tensor | None = None) -> Tensor:
    """Entropy of a distribution over that of the even one: 1 = even, 0 = one expert does it all.
    Even over the active experts, if they are given."""
    if active is None:
        return entropy(load) / math.log(max(load.shape[-1], 2))
    return entropy(load) / active.sum().clamp(min=2).log()


def training_metrics(routings: list[Routing]) -> dict[str, Tensor]:
    """Scalars for the training log, per layer, from one batch's matching queries."""
    metrics: dict[str, Tensor] = {}
    for i, routing in enumerate(routings):
        with torch.no_grad():
            load, on = expert_load(routing), active_experts(routing)
            found = {
                "load_entropy": normalised_entropy(load, on),
                "load_max": load.max(),
                "dead_experts": ((load == 0) & on).float().sum(),
            }
            if parts_of(routing) > 1 or routing.expert_ids.shape[1] == 1:
                flags = sibling_tokens(routing.expert_ids, parts_of(routing))
                found["siblings"], found["same_part"] = (flag.float().mean() for flag in flags)
            if routing.active is None:  # a distribution, not a top-any router's scores
                found["router_entropy"] = normalised_entropy(routing.probs).mean()
            else:
                taken = (routing.expert_ids >= 0).sum(1).float()
                found["active_experts"] = on.float().sum()
                found["experts_per_token"] = taken.mean()
                found["unrouted_tokens"] = (taken == 0).float().mean()
            if routing.scene_probs is not None:
                found["scene_entropy"] = normalised_entropy(routing.scene_probs).mean()
        metrics |= {f"moe/layer{i}/{name}": value for name, value in found.items()}
    return metrics
