"""The expert FFN in torch without a loop over tokens, as PyTorch operators: the choice of a CPU.

Slots are sorted by expert once; every expert that has tokens then runs a pair of matmuls.
Deterministic: results return to their tokens by a gather and a sum over K, never by atomics.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import GATED

_aten = torch.ops.aten
# name -> (function that writes to `out`, gradient of the loss at its input given that at its output
# and the input)
_PLAIN: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "relu": (
        lambda pre, out: torch.clamp_min(pre, 0, out=out),
        lambda grad, pre: _aten.threshold_backward(grad, pre, 0),
    ),
    "gelu": (lambda pre, out: _aten.gelu.out(pre, out=out), _aten.gelu_backward),
    "gelu_tanh": (
        lambda pre, out: _aten.gelu.out(pre, approximate="tanh", out=out),
        lambda grad, pre: _aten.gelu_backward(grad, pre, approximate="tanh"),
    ),
    "silu": (lambda pre, out: _aten.silu.out(pre, out=out), _aten.silu_backward),
}


def _gated(plain: str) -> tuple:
    """The same pair for act(gate) * up, whose input [n, 2H] is gate and up side by side."""
    act, act_backward = _PLAIN[plain]

    def value(pre: Tensor, out: Tensor) -> Tensor:
        gate, up = pre.chunk(2, 1)
        return act(gate, out).mul_(up)

    def gradient(grad: Tensor, pre: Tensor) -> Tensor:
        gate, up = pre.chunk(2, 1)
        of_up = grad * act(gate, torch.empty_like(gate))
        return torch.cat((act_backward(grad * up, gate), of_up), 1)

    return value, gradient


_ACTIVATIONS = _PLAIN | {name: _gated(plain) for name, plain in GATED.items()}


def grouped_ffn(
    x, w1, b1, w2, b2, expert_ids, gates, activation: str, recompute: bool = False
) -> Tensor:
    """See `dynamic_dino_kernels.moe.expert_ffn`, which has checked the arguments."""
    if gates is None:  # where all are 1, summing with them costs next to nothing here
        gates = x.new_ones(expert_ids.shape)
    save = needs_grad(x, w1, b1, w2, b2, gates)
    return grouped_op(
        x, w1, b1, w2, b2, expert_ids, gates, activation, save, save and not recompute
    )[0]


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow, for which things must be kept."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    expert_ids: Tensor,
    gates: Tensor,
    activation: str,
    save_rows: bool,
    save_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y [T, D]; the plan: slots [N], by expert, then by token, empty ones last, and offsets
    [E + 1] of the experts' rows; the rows [N, D] before the gates, and the hidden layer before the
    activation, [N, H] or [N, 2H], each empty unless it is to be saved."""
    act, _ = _ACTIVATIONS[activation]
    tokens, top_k = expert_ids.shape
    x_rows, sizes, slots, offsets = expert_rows(x, expert_ids, len(w1))
    filled = len(x_rows)

    # Fresh memory costs page faults: experts share the buffer of what isn't kept.
    rows = x.new_empty(tokens * top_k, w2.shape[1])
    pre = x.new_empty(tokens * top_k if save_hidden else 0, w1.shape[1])
    # What is kept of a gated activation takes the gates' half.
    buffer = x.new_empty(max(sizes), w2.shape[2] if save_hidden else w1.shape[1])
    hidden = [buffer[:size, : w2.shape[2]] for size in sizes]
    for size, x_e, w1_e, b1_e, pre_e, hidden_e, w2_e, b2_e, out_e in zip(
        sizes, x_rows.split(sizes), w1.transpose(1, 2).unbind(), unbind(b1, len(w1)),
        pre[:filled].split(sizes) if save_hidden else [buffer[:size] for size in sizes], hidden,
        w2.transpose(1, 2).unbind(), unbind(b2, len(w2)), rows[:filled].split(sizes), strict=True,
    ):  # fmt: skip
        if size:
            _linear(x_e, w1_e, b1_e, pre_e)
            _linear(act(pre_e, hidden_e), w2_e, b2_e, out_e)
    y = sum_slots(rows, slots, filled, expert_ids, gates)
    return y, slots, offsets, rows if save_rows else rows.new_empty(0, rows.shape[1]), pre


def expert_rows(
    x: Tensor, expert_ids: Tensor, experts: int
) -> tuple[Tensor, list[int], Tensor, Tensor]:
    """The rows of x by expert, one for each slot that isn't empty, and how many each expert has;
    the plan: slots [N], by expert, then by token, empty ones last, and offsets [E + 1]."""
    owner = torch.where(expert_ids < 0, experts, expert_ids).flatten()
    slots = torch.argsort(owner, stable=True)
    offsets = F.pad(torch.bincount(owner, minlength=experts + 1).cumsum(0)[:-1], (1, 0))
    filled, sizes = _sizes(offsets)
    return x.index_select(0, _tokens(slots[:filled], expert_ids.shape[1])), sizes, slots, offsets


def backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    expert_ids: Tensor,
    gates: Tensor,
    slots: Tensor,
    offsets: Tensor,
    rows: Tensor,
    pre: Tensor,
    activation: str,
    hidden_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, b1, w2, b2 and gates; without `hidden_grads`, the first three are empty,
    and so is that of a bias that isn't there.

    Each expert's weight gradient lands in its slice of one buffer; autograd would build as many
    small ones and stack them.
    """
    act, act_backward = _ACTIVATIONS[activation]
    filled, sizes = _sizes(offsets)
    used = slots[:filled]
    token = _tokens(used, expert_ids.shape[1])
    x_rows, drows = x.index_select(0, token), dy.index_select(0, token)
    dgates = gates.new_zeros(gates.numel())
    dgates[used] = (drows * rows[:filled]).sum(-1, dtype=gates.dtype)
    drows *= gates.to(x.dtype).flatten().index_select(0, used)[:, None]

    buffer = x.new_empty(max(sizes), w2.shape[2])
    dx_rows = x.new_empty(len(slots) if hidden_grads else 0, x.shape[1])
    grads = dw1, db1, dw2, db2 = _empty_grads(w1, b1, w2, b2, hidden_grads)
    end = 0
    for e, size in enumerate(sizes):
        start, end = end, end + size
        if not size:
            for grad in grads:
                if len(grad):
                    grad[e] = 0
            continue
        x_e, drow_e = x_rows[start:end], drows[start:end]
        pre_e = pre[start:end]
        if not len(pre):
            pre_e = _linear(x_e, w1[e].t(), None if b1 is None else b1[e])
        torch.mm(drow_e.t(), act(pre_e, buffer[:size]), out=dw2[e])
        if len(db2):
            torch.sum(drow_e, 0, out=db2[e])
        if hidden_grads:
            dpre_e = act_backward(torch.mm(drow_e, w2[e], out=buffer[:size]), pre_e)
            torch.mm(dpre_e.t(), x_e, out=dw1[e])
            if len(db1):
                torch.sum(dpre_e, 0, out=db1[e])
            torch.mm(dpre_e, w1[e], out=dx_rows[start:end])
    dx = sum_slots(dx_rows, slots, filled, expert_ids) if hidden_grads else dx_rows
    return dx, dw1, db1, dw2, db2, dgates.view_as(gates)


def _empty_grads(w1, b1, w2, b2, hidden_grads: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the gradients of the weights; none where there is none to compute."""
    first = (None, None) if not hidden_grads else (w1, b1)
    return tuple(w2.new_empty(0 if p is None else p.shape) for p in (*first, w2, b2))


def _linear(x: Tensor, w_t: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    if bias is None:
        return torch.mm(x, w_t, out=out)
    return torch.addmm(bias, x, w_t, out=out)


def unbind(bias: Tensor | None, experts: int) -> tuple[Tensor | None, ...]:
    return (None,) * experts if bias is None else bias.unbind()


def _sizes(offsets: Tensor) -> tuple[int, list[int]]:
    """How many slots are filled, and the number of rows of each expert."""
    ends = offsets.tolist()
    return ends[-1], [end - start for start, end in zip(ends, ends[1:], strict=False)]


def _tokens(slots: Tensor, top_k: int) -> Tensor:
    return slots.div(max(top_k, 1), rounding_mode="floor")


def sum_slots(
    rows: Tensor, slots: Tensor, filled: int, expert_ids: Tensor, gates: Tensor | None = None
) -> Tensor:
    """[N, D] -> [T, D]: sums each token's rows, with weights if given."""
    if len(slots) == 0:
        return rows.new_zeros(len(expert_ids), rows.shape[1])
    place = torch.empty_like(slots)
    place[slots] = torch.arange(len(slots), device=slots.device)
    # Empty slots come last, and their rows were never written: the first stands for all, skipped.
    padding = None
    if filled < len(slots):
        place, padding = place.clamp(max=filled), filled
    if gates is not None:
        gates = gates.to(rows.dtype).masked_fill(expert_ids < 0, 0)
    place = place.view_as(expert_ids)
    return F.embedding_bag(place, rows, mode="sum", per_sample_weights=gates, padding_idx=padding)


# ---- operators ----------------------------------------------------------------------------------

grouped_op = torch.library.custom_op("dynamic_dino::grouped_ffn", forward, mutates_args=())
grouped_backward_op = torch.library.custom_op(
    "dynamic_dino::grouped_ffn_backward", backward, mutates_args=()
)


@grouped_op.register_fake
def _(x, w1, b1, w2, b2, expert_ids, gates, activation, save_rows, save_hidden):
    n = expert_ids.shape[0] * expert_ids.shape[1]
    slots, offsets = (x.new_empty(k, dtype=torch.int64) for k in (n, w1.shape[0] + 1))
    rows = x.new_empty(n if save_rows else 0, x.shape[1])
    pre = x.new_empty(n if save_hidden else 0, w1.shape[1])
    return x.new_empty(x.shape), slots, offsets, rows, pre


@grouped_backward_op.register_fake
def _(
    dy, x, w1, b1, w2, b2, expert_ids, gates, slots, offsets, rows, pre, activation, hidden_grads
):  # fmt: skip
    dx = x.new_empty(x.shape if hidden_grads else (0, x.shape[1]))
    return dx, *_empty_grads(w1, b1, w2, b2, hidden_grads), gates.new_empty(gates.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.activation, _, _ = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(*tensors, *kept)


def _differentiate(ctx, dy, *_):
    needs = ctx.needs_input_grad
    dx, dw1, db1, dw2, db2, dgates = grouped_backward_op(
        dy, *ctx.saved_tensors, ctx.activation, any(needs[:3])
    )
    grads = (dx, dw1, db1, dw2, db2, None, dgates, None, None, None)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


grouped_op.register_autograd(_differentiate, setup_context=_setup_context)
