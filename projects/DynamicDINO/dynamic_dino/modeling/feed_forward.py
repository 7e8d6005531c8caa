"""The dense feed-forward network, which MoE-Tuning turns into experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..moe.routing import Routing


class FeedForward(nn.Module):
    """The dense FFN: linear, activation, linear. `MoEFeedForward` has the same interface.

    Args:
        widen: loads the weights of a narrower FFN, too. Its units come first; those that it lacks
            start as they were drawn, with output weights of zero, so that the FFN computes what
            the narrower one does. The control of MoE-Tuning with as many parameters.

    Raises:
        ValueError: in loading, an FFN that is wider than this one.
    """

    def __init__(
        self, dim: int, hidden: int, activation: str = "relu", widen: bool = False
    ) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.activation = activation
        if widen:
            self.register_load_state_dict_pre_hook(add_units)

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


def add_units(ffn: FeedForward, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Load-state-dict pre-hook: as many units as the FFN has, of a narrower one's weights."""
    names = [prefix + name for name in ("linear1.weight", "linear1.bias", "linear2.weight")]
    if not all(name in state_dict for name in names):
        return
    w1, b1, w2 = (state_dict[name] for name in names)
    known, hidden = len(w1), ffn.linear1.out_features
    if known > hidden:
        raise ValueError(
            f"{names[0]} has {known} hidden units, more than the {hidden} of this model's FFN: "
            f"choose hidden={known} or more"
        )
    new1, new_bias = ffn.linear1.weight.detach()[known:], ffn.linear1.bias.detach()[known:]
    state_dict[names[0]] = torch.cat([w1, new1.to(w1)])
    state_dict[names[1]] = torch.cat([b1, new_bias.to(b1)])
    state_dict[names[2]] = torch.cat([w2, w2.new_zeros(len(w2), hidden - known)], 1)
