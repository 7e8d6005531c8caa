"""MoE-Tuning: what a dense FFN becomes, and how large a model with experts is."""

from __future__ import annotations

from torch import Tensor, nn


def split_ffn(
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, parts: int, copies: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Algorithm 1's expert initialisation: FFN(x) = sum over the parts of one copy.

    W1 [H, D] is cut by rows and W2 [D, H] by columns into k = `parts`, b2 is divided by k, and the
    k parts are repeated N = `copies` times. Expert e is part e % k of copy e // k.

    Returns w1 [kN, H/k, D], b1 [kN, H/k], w2 [kN, D, H/k], b2 [kN, D].
    """
    hidden, dim = w1.shape
    size = hidden // parts
    return (
        w1.view(parts, size, dim).repeat(copies, 1, 1),
        b1.view(parts, size).repeat(copies, 1),
        w2.view(dim, parts, size).transpose(0, 1).repeat(copies, 1, 1),
        (b2 / parts).repeat(parts * copies, 1),
    )


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters: all ("total"), with a gradient ("trainable"), and used by one token ("active").

    Active counts k of an MoE layer's E experts, the first number of the paper's Table 8. Where a
    token takes as many as it likes, k is the most it can take; `RoutingStatistics` has the mean.
    """
    from .layer import MoEFeedForward  # it imports this module

    total = sum(p.numel() for p in model.parameters())
    idle = sum(
        sum(p.numel() for p in m.experts.parameters()) * (m.num_experts - m.top_k) // m.num_experts
        for m in model.modules()
        if isinstance(m, MoEFeedForward)
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"total": total, "trainable": trainable, "active": total - idle}
