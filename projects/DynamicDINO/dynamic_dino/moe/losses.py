"""Router losses: functions of the `Routing`s of a forward pass."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .routing import Routing


class RouterLoss(Protocol):
    """What `Criterion` asks of a loss on routers."""

    name: str  # in the log

    def __call__(self, routings: list[Routing]) -> Tensor:
        """The weighted loss, a scalar, of the routings of a forward pass, one of each MoE layer."""


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


class SquaredBalanceLoss:
    """weight * sum_k (f_k - 1 / E)^2, mean over layers (HI-MoE, section 3.5).

    f_k is expert k's share of the filled slots. Shares of hard choices have no gradient, and the
    paper doesn't say what takes its place: here it is that of the mean probability P_k.
    """

    name = "loss_squared_balance"

    def __init__(self, weight: float = 0.01) -> None:
        self.weight = weight

    def __call__(self, routings: list[Routing]) -> Tensor:
        terms = []
        for routing in routings:
            mean = routing.probs.mean(0)
            share = expert_load(routing) + mean - mean.detach()
            terms.append((share - 1 / routing.num_experts).square().sum())
        return self.weight * torch.stack(terms).mean()


class DiversityLoss:
    """weight * (log m - JS(p_1, ..., p_m)), mean over layers: HI-MoE's diversity loss.

    The paper names a regulariser based on the Jensen-Shannon divergence of the experts' outputs;
    the rest is ours. p_e is the softmax over channels of expert e's mean output for tokens of its
    own, m the number of experts that have any, and JS = H(mean_e p_e) - mean_e H(p_e), H the
    entropy. The loss is zero where experts answer on different channels, log m where all answer
    alike. The layers must have `response_tokens`.
    """

    name = "loss_diversity"

    def __init__(self, weight: float = 0.001) -> None:
        self.weight = weight

    def __call__(self, routings: list[Routing]) -> Tensor:
        terms = []
        for routing in routings:
            if routing.mean_outputs is None:
                raise ValueError(
                    "DiversityLoss needs the experts' mean outputs: set response_tokens of "
                    "MoEFeedForward, e.g. to 32"
                )
            used = (expert_load(routing) > 0).float()
            count = used.sum().clamp(min=1)
            p = routing.mean_outputs.float().softmax(-1)
            mean = (p * used[:, None]).sum(0) / count
            divergence = entropy(mean) - (entropy(p) * used).sum() / count
            terms.append(count.log() - divergence)
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
    """How many slots each expert fills: ids of any shape, -1 = empty -> int64 [E]"""
    # torch.bincount reads the largest id on the host, and so waits for the GPU.
    experts = torch.arange(num_experts, device=ids.device)
    return (ids.flatten()[:, None] == experts).sum(0)


def entropy(p: Tensor) -> Tensor:
    """Of distributions in the last dimension, in nats; its gradient is finite at zero too."""
    return -(p * p.clamp(min=1e-12).log()).sum(-1)
