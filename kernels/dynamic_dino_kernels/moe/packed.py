"""Experts whose weights are packed once for oneDNN: inference in float32 on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import POST_OPS, PackedWeight, applies, gain, multiply, obstacle
from . import checks, expert_ffn
from .grouped import expert_rows, sum_slots, unbind
from .reference import add_and_norm


class PackedExperts:
    """`expert_ffn` with the experts' weights inside; `pack_experts` makes one.

    The back-end is "grouped", with a pair of oneDNN's products per expert that has tokens. Where
    packed weights don't apply (a gradient is asked for, autocast, tracing, another device or dtype)
    the weights are unpacked for the call, and the result is that of `expert_ffn`.
    """

    def __init__(
        self,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        activation: str,
        rows: int,
    ) -> None:
        self.activation = activation
        self.w1 = [PackedWeight(w, rows) for w in w1.detach()]
        self.w2 = [PackedWeight(w, rows) for w in w2.detach()]
        self.b1, self.b2 = (b if b is None else b.detach() for b in (b1, b2))
        # Of the weights' shapes, without their memory, for the checks of the arguments.
        self._like = (w1.new_empty(w1.shape[2]).expand(w1.shape), self.b1,
                      w2.new_empty(w2.shape[2]).expand(w2.shape), self.b2)  # fmt: skip

    def dense(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """w1 [E, H, D], b1 [E, H], w2 [E, D, H], b2 [E, D] as they were."""
        w1, w2 = (torch.stack([w.dense() for w in packed]) for packed in (self.w1, self.w2))
        return w1, self.b1, w2, self.b2

    def __call__(
        self,
        x: Tensor,
        expert_ids: Tensor,
        gates: Tensor | None,
        *,
        norm: tuple[Tensor, Tensor, float] | None = None,
    ) -> Tensor:
        """Arguments, result and errors as those of `expert_ffn`."""
        if not applies(x, *(() if gates is None else (gates,))):
            w1, b1, w2, b2 = self.dense()
            w1, w2 = w1.to(x.device), w2.to(x.device)
            b1, b2 = (b if b is None else b.to(x.device) for b in (b1, b2))
            return expert_ffn(
                x, w1, b1, w2, b2, expert_ids, gates, activation=self.activation, norm=norm
            )
        checks.check_experts(x, *self._like, self.activation, norm)
        checks.check_routing(x, self._like[0], expert_ids, gates)
        x_rows, sizes, slots, _ = expert_rows(x, expert_ids, len(self.w1))
        rows = [
            multiply(multiply(x_e, w1_e, b1_e, self.activation), w2_e, b2_e, "none")
            for x_e, w1_e, b1_e, w2_e, b2_e in zip(
                x_rows.split(sizes),
                self.w1,
                unbind(self.b1, len(self.w1)),
                self.w2,
                unbind(self.b2, len(self.w2)),
                strict=True,
            )
            if len(x_e)
        ]
        filled = len(x_rows)
        rows.append(x.new_empty(int(filled < len(slots)), x.shape[1]))  # stands for the empty slots
        y = sum_slots(torch.cat(rows), slots, filled, expert_ids, gates)
        return add_and_norm(x, y, norm)


def pack_experts(
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "relu",
    rows: int = 64,
) -> PackedExperts:
    """Experts packed for oneDNN, which `PackedExperts` multiplies tokens with.

    Args:
        w1, b1, w2, b2: float32 [E, H, D], [E, H], [E, D, H], [E, D] on a CPU, as of `expert_ffn`.
            They are copied: without other references to them, no memory is used twice.
        activation: "relu", "gelu" (exact) or "silu".
        rows: how many tokens an expert will mostly get; any number works.

    Raises:
        ValueError: they can't be packed; the message says why.
    """
    reason = obstacle(w1.device, w1.dtype)
    if activation not in POST_OPS:
        reason = f"oneDNN has no activation {activation!r}, only {', '.join(POST_OPS)}"
    if reason:
        raise ValueError(f"these experts can't be packed: {reason}")
    return PackedExperts(w1, b1, w2, b2, activation, rows)


def expert_gain(rows: int, dim: int, hidden: int, activation: str = "relu") -> float:
    """`gain` of an expert that gets so many tokens: of both products together."""
    first, second = gain(rows, dim, hidden, activation), gain(rows, hidden, dim)
    return 2 / (1 / first + 1 / second)  # they cost about the same
