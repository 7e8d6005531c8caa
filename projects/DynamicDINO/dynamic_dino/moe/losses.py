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


class SparseGatingLoss:
    """weight * (||W W^T - I||_F + mean_e ||w_e||), W the representations of the active experts.

    DynMoE's sparse and simple gating loss (equation 8), mean over layers: experts that look in
    different directions are seldom chosen together, and short rows keep it simple. Its published
    code, whose weight this is, normalises the rows before the first term; the paper doesn't.
    """

    name = "loss_sparse_gating"

    def __init__(self, weight: float = 0.01) -> None:
        self.weight = weight

    def __call__(self, routings: list[Routing]) -> Tensor:
        terms = []
        for routing in routings:
            if routing.keys is None:
                raise ValueError(
                    "SparseGatingLoss needs routers that report their experts' representations "
                    "(Routing.keys), such as TopAnyRouter"
                )
            rows, on = routing.keys.float(), routing.active
            on = torch.ones_like(rows[:, 0]) if on is None else on.to(rows.dtype)
            likeness = (rows @ rows.T - torch.eye(len(rows), device=rows.device)) * on * on[:, None]
            lengths = torch.linalg.vector_norm(rows, dim=1)
            terms.append(likeness.norm() + (lengths * on).sum() / on.sum())
        return self.weight * torch.stack(terms).mean()


def expert_load(routing: Routing) -> Tensor:
    """Share of the filled slots that each expert gets: float [E], sums to one."""
    counts = expert_counts(routing.expert_ids, routing.num_experts).float()
    return counts / counts.sum().clamp(min=1)


def expert_counts(ids: Tensor, num_experts: int) -> Tensor:
    """How many slots each expert fills: ids [T, K], -1 = empty -> int64 [E]"""
    return torch.bincount(ids.flatten().long() + 1, minlength=num_experts + 1)[1:]
