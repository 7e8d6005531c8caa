"""How large a model with experts is."""

from __future__ import annotations

from torch import nn

from .layer import MoEFeedForward


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters: all ("total"), with a gradient ("trainable"), and used by one token ("active").

    Active counts k of an MoE layer's E experts, the first number of the paper's Table 8. Where a
    token takes as many as it likes, k is the most it can take; `RoutingStatistics` has the mean.
    """
    total = sum(p.numel() for p in model.parameters())
    idle = sum(
        sum(p.numel() for p in m.experts.parameters())
        * (m.router.num_experts - m.router.top_k)
        // m.router.num_experts
        for m in model.modules()
        if isinstance(m, MoEFeedForward)
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"total": total, "trainable": trainable, "active": total - idle}
