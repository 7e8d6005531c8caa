"""Router losses: functions of the `Routing`s of a forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .routing import Routing


class LoadBalanceLoss:
    """alpha * E * sum_i f_i P_i, mean over layers (Switch Transformer, eq. 4; alpha: Dynamic-DINO).

    f_i is expert i's share of all filled slots, P_i the mean of its probability. The loss is alpha
    when the load is even, and grows with imbalance; the gradient flows through P.
    """

    name = "loss_load_balance"

    def __init__(self, weight: float = 0.01) -> None:
        self.weight = weight

    def __call__(self, routings: list[Routing]) -> Tensor:
        terms = []
        for routing in routings:
            share = expert_load(routing)
            terms.append(routing.num_experts * (share * routing.probs.mean(0)).sum())
        return self.weight * torch.stack(terms).mean()


def expert_load(routing: Routing) -> Tensor:
    """Share of the filled slots that each expert gets: float [E], sums to one."""
    ids = routing.expert_ids.flatten().long()
    counts = torch.bincount(ids + 1, minlength=routing.num_experts + 1)[1:].float()
    return counts / counts.sum().clamp(min=1)
