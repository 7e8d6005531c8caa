"""Stacked experts: E small FFNs in four tensors, in nn.Linear's orientation."""

from __future__ import annotations

from typing import Any

import torch
from dynamic_dino_kernels.backend import BACKENDS
from dynamic_dino_kernels.moe import expert_ffn, moe_block
from torch import Tensor, nn

from .losses import expert_counts
from .routing import Routing


class Experts(nn.Module):
    """y = sum over the chosen experts e of gate_e * (act(x W1_e^T + b1_e) W2_e^T + b2_e).

    w1 [E, H, D], b1 [E, H], w2 [E, D, H], b2 [E, D]. `backend` ("auto", "triton", "grouped" or
    "sequential") and `recompute` (the hidden layer in the backward pass, which saves memory) are
    passed to `dynamic_dino_kernels.moe.expert_ffn`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        activation: str = "relu",
        backend: str = "auto",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}: choose one of {', '.join(BACKENDS)}")
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.b1 = nn.Parameter(torch.empty(num_experts, hidden))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.b2 = nn.Parameter(torch.empty(num_experts, dim))
        self.activation, self.backend, self.recompute = activation, backend, recompute
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every expert like a dense FFN of its own size (xavier, zero biases)."""
        for stacked in (self.w1, self.w2):
            for w in stacked:
                nn.init.xavier_uniform_(w)
        nn.init.zeros_(self.b1)
        nn.init.zeros_(self.b2)

    def forward(self, x: Tensor, routing: Routing, norm: nn.LayerNorm | None = None) -> Tensor:
        """x [T, D] -> y [T, D], or norm(x + y) if a norm is given"""
        return expert_ffn(
            x,
            self.w1,
            self.b1,
            self.w2,
            self.b2,
            routing.expert_ids,
            routing.gates,
            activation=self.activation,
            norm=None if norm is None else (norm.weight, norm.bias, norm.eps),
            blocks=routing.blocks,
            recompute=self.recompute,
            backend=self.backend,
        )

    def with_router(
        self, x: Tensor, norm: nn.LayerNorm | None = None, **router: Any
    ) -> tuple[Tensor, Routing]:
        """`forward` after routing by the arguments of `Router.block`, in one call."""
        y, routed = moe_block(
            x,
            w1=self.w1,
            b1=self.b1,
            w2=self.w2,
            b2=self.b2,
            activation=self.activation,
            norm=None if norm is None else (norm.weight, norm.bias, norm.eps),
            recompute=self.recompute,
            backend=self.backend,
            **router,
        )
        return y, Routing(*routed)

    def mean_outputs(self, x: Tensor, routing: Routing, most: int) -> Tensor:
        """Each expert's mean output for tokens of its own: x [T, D] -> [E, D], 0 where it has none.

        At most `most` tokens of an expert are looked at, evenly spread over those it has, so this
        costs E * most rows whatever T is. The gradient reaches the experts, not the tokens.
        """
        experts = torch.arange(len(self.w1), device=x.device)[:, None]
        ids = routing.expert_ids.flatten().long()
        slots = ids.sort(stable=True).indices  # empty slots, then those of expert 0, 1, ...
        counts = expert_counts(ids + 1, len(experts) + 1)  # those of empty slots first
        first, count = counts.cumsum(0)[:-1, None], counts[1:, None]
        taken = count.clamp(max=most)
        step = torch.arange(most, device=x.device)
        index = first + step * count // taken.clamp(min=1)
        token = slots[index.clamp(max=len(ids) - 1)] // routing.expert_ids.shape[1]
        chosen = torch.where(step < taken, experts, -1).flatten()[:, None]
        y = expert_ffn(
            x.detach()[token.flatten()],
            self.w1,
            self.b1,
            self.w2,
            self.b2,
            chosen.int(),
            torch.ones_like(chosen, dtype=torch.float32),
            activation=self.activation,
            backend=self.backend,
        )
        return y.unflatten(0, (-1, most)).sum(1) / taken.clamp(min=1)
