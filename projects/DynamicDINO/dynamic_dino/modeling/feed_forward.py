"""The dense feed-forward network, which MoE-Tuning turns into experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..moe.routing import Routing


class FeedForward(nn.Module):
    """The dense FFN: linear, activation, linear. `MoEFeedForward` has the same interface."""

    def __init__(self, dim: int, hidden: int, activation: str = "relu") -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.activation = activation

    def reset_parameters(self) -> None:
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, scene: Tensor | None = None, norm: nn.LayerNorm | None = None
    ) -> tuple[Tensor, Routing | None]:
        """x [B, N, D] -> (y [B, N, D], None), or norm(x + y) if a norm is given"""
        hidden = self.linear1(x)
        # In place where autograd doesn't need what was there: it is the largest map of all.
        activate = torch.relu_ if self.activation == "relu" else getattr(F, self.activation)
        y = self.linear2(activate(hidden))
        return (y if norm is None else norm(x + y)), None
