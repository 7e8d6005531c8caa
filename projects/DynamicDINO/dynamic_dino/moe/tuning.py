"""MoE-Tuning: what a dense FFN becomes."""

from __future__ import annotations

from torch import Tensor


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
