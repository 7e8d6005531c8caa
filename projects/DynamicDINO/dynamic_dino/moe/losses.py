"""Router losses: functions of the `Routing`s of a forward pass."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .routing import Routing


class RouterLoss(Protocol):
    """What `Criterion` asks of a loss on routers.

    It sees the tokens of one process and one micro-batch, and its gradient is the mean over them. A
    loss that is a mean over tokens would be that of the whole batch; but these are products of
    means, or functions of them. Of micro-batches m, `LoadBalanceLoss` is the mean of E * sum_i f_im
    P_im, which is that of one large batch plus E * sum_i cov_m(f_im, P_im), so by at most E * sum_i
    std_m(f_im) std_m(P_im) another: equal where all micro-batches use the experts alike, even if
    unevenly. `SquaredBalanceLoss` is that of one large batch plus sum_i var_m(f_im).
    """

    name: str  # in the log

    def __call__(self, routings: list[Routing]) -> Tensor:
        """The weighted loss, a scalar, of the routings of a forward pass, one of each MoE layer."""


class LayerLoss:
    """`weight` times the loss of a MoE layer, over all layers: their mean, or their sum.

    The papers write the loss of one layer. Their codes add the layers up (Switch Transformer,
    MoE-LLaVA, DynMoE); by the mean, a weight means the same however many layers have experts.
    """

    name: str

    def __init__(self, weight: float = 0.01, over_layers: str = "mean") -> None:
        if over_layers not in ("mean", "sum"):
            raise ValueError(f"over_layers={over_layers!r}: choose mean or sum")
        self.weight, self.over_layers = weight, over_layers

    def __call__(self, routings: list[Routing]) -> Tensor:
        terms = torch.stack([self.of_layer(routing) for routing in routings])
        return self.weight * (terms.mean() if self.over_layers == "mean" else terms.sum())

    def of_layer(self, routing: Routing) -> Tensor:
        raise NotImplementedError


class LoadBalanceLoss(LayerLoss):
    """alpha * E * sum_i f_i P_i of a layer (Switch Transformer, eq. 4; alpha: Dynamic-DINO).

    f_i is expert i's share of all filled slots, P_i the mean of its probability. The loss is alpha
    when the load is even, and grows with imbalance; the gradient flows through P.
    """

    name = "loss_load_balance"

    def of_layer(self, routing: Routing) -> Tensor:
        return routing.num_experts * (expert_load(routing) * routing.probs.mean(0)).sum()


class SquaredBalanceLoss(LayerLoss):
    """weight * sum_k (f_k - 1 / E)^2 of a layer (HI-MoE, section 3.5).

    f_k is expert k's share of the filled slots. Shares of hard choices have no gradient, and the
    paper doesn't say what takes its place: here it is that of the mean probability P_k.
    """

    name = "loss_squared_balance"

    def of_layer(self, routing: Routing) -> Tensor:
        mean = routing.probs.mean(0)
        share = expert_load(routing) + mean - mean.detach()
        return (share - 1 / routing.num_experts).square().sum()


class DiversityLoss(LayerLoss):
    """weight * (log m - JS(p_1, ..., p_m)) of a layer: HI-MoE's diversity loss.

    The paper names a regulariser based on the Jensen-Shannon divergence of the experts' outputs;
    the rest is ours. p_e is the softmax over channels of expert e's mean output for tokens of its
    own, m the number of experts that have any, and JS = H(mean_e p_e) - mean_e H(p_e), H the
    entropy. The loss is zero where experts answer on different channels, log m where all answer
    alike. The layers must have `response_tokens`.
    """

    name = "loss_diversity"

    def __init__(self, weight: float = 0.001, over_layers: str = "mean") -> None:
        super().__init__(weight, over_layers)

    def of_layer(self, routing: Routing) -> Tensor:
        if routing.mean_outputs is None:
            raise ValueError(
                "DiversityLoss needs the experts' mean outputs: set response_tokens of "
                "MoEFeedForward, e.g. to 32"
            )
        used = (expert_load(routing) > 0).float()
        count = used.sum().clamp(min=1)
        p = routing.mean_outputs.float().softmax(-1)
        mean = (p * used[:, None]).sum(0) / count
        return count.log() - (entropy(mean) - (entropy(p) * used).sum() / count)


class SparseGatingLoss(LayerLoss):
    """weight * (||W W^T - I||_F + mean_e ||w_e||) of a layer, W the representations of its active
    experts: DynMoE's sparse and simple gating loss (equation 8).

    Experts that look in different directions are seldom chosen together, the paper says, and short
    rows keep it simple. Neither term asks for few experts a token: rows that start orthonormal are
    at the minimum of the first. The published code, whose weight this is, normalises the rows
    before the first term; the paper doesn't.
    """

    name = "loss_sparse_gating"

    def of_layer(self, routing: Routing) -> Tensor:
        if routing.keys is None:
            raise ValueError(
                "SparseGatingLoss needs routers that report their experts' representations "
                "(Routing.keys), such as TopAnyRouter"
            )
        rows, on = routing.keys.float(), routing.active
        on = torch.ones_like(rows[:, 0]) if on is None else on.to(rows.dtype)
        likeness = (rows @ rows.T - torch.eye(len(rows), device=rows.device)) * on * on[:, None]
        lengths = torch.linalg.vector_norm(rows, dim=1)
        return likeness.norm() + (lengths * on).sum() / on.sum()


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
