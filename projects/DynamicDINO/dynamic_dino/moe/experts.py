"""Stacked experts: E small FFNs in four tensors, in nn.Linear's orientation."""

from __future__ import annotations

import torch
from dynamic_dino_kernels.moe import expert_ffn
from torch import Tensor, nn

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
            norm=norm and (norm.weight, norm.bias, norm.eps),
            counts=routing.counts,
            recompute=self.recompute,
            backend=self.backend,
        )
