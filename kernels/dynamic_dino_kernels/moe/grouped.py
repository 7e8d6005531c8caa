"""The expert FFN in torch without a loop over tokens, as PyTorch operators: the choice of a CPU.

Slots are sorted by expert once; every expert that has tokens then runs a pair of matmuls.
Deterministic: results return to their tokens by a gather and a sum over K, never by atomics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten
# name -> (function that writes to `out`, gradient of the loss at its input given that at its output
# and the input)
_ACTIVATIONS = {
    "relu": (
        lambda pre, out: torch.clamp_min(pre, 0, out=out),
        lambda grad, pre: _aten.threshold_backward(grad, pre, 0),
    ),
    "gelu": (lambda pre, out: _aten.gelu.out(pre, out=out), _aten.gelu_backward),
    "silu": (lambda pre, out: _aten.silu.out(pre, out=out), _aten.silu_backward),
}


def grouped_ffn(
    x, w1, b1, w2, b2, expert_ids, gates, activation: str, recompute: bool = False
) -> Tensor:
    """See `dynamic_dino_kernels.moe.expert_ffn`, which has checked the arguments."""
    save = needs_grad(x, w1, b1, w2, b2, gates)
    return grouped_op(
        x, w1, b1, w2, b2, expert_ids, gates, activation, save, save and not recompute
    )[0]


def needs_grad(*tensors: Tensor) -> bool:
    """Whether a backward pass may follow, for which things must be kept."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    activation: str,
    save_rows: bool,
    save_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y [T, D]; the plan: slots [N], by expert, then by token, empty ones last, and offsets
    [E + 1] of the experts' rows; the rows [N, D] before the gates, and the hidden layer before the
    activation, [N, H], each empty unless it is to be saved."""
    act, _ = _ACTIVATIONS[activation]
    tokens, top_k = expert_ids.shape
    x_rows, sizes, slots, offsets = expert_rows(x, expert_ids, len(w1))
    filled = len(x_rows)

    # Fresh memory costs page faults: experts share the buffer of what isn't kept.
    rows = x.new_empty(tokens * top_k, w2.shape[1])
    pre = x.new_empty(tokens * top_k if save_hidden else 0, w1.shape[1])
    buffer = x.new_empty(max(sizes), w1.shape[1])
    hidden = [buffer[:size] for size in sizes]
    for size, x_e, w1_e, b1_e, pre_e, hidden_e, w2_e, b2_e, out_e in zip(
        sizes, x_rows.split(sizes), w1.transpose(1, 2).unbind(), b1.unbind(),
        pre[:filled].split(sizes) if save_hidden else hidden, hidden,
        w2.transpose(1, 2).unbind(), b2.unbind(), rows[:filled].split(sizes), strict=True,
    ):  # fmt: skip
        if size:
            torch.addmm(b1_e, x_e, w1_e, out=pre_e)
            torch.addmm(b2_e, act(pre_e, hidden_e), w2_e, out=out_e)
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
    b1: Tensor,
    w2: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    slots: Tensor,
    offsets: Tensor,
    rows: Tensor,
    pre: Tensor,
    activation: str,
    hidden_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, b1, w2, b2 and gates; without `hidden_grads`, the first three are empty.

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

    buffer = x.new_empty(max(sizes), w1.shape[1])
    dx_rows = x.new_empty(len(slots) if hidden_grads else 0, x.shape[1])
    dw1, db1 = (p.new_empty(p.shape if hidden_grads else 0) for p in (w1, b1))
    dw2, db2 = w2.new_empty(w2.shape), w2.new_empty(w2.shape[:2])
    end = 0
    for e, size in enumerate(sizes):
        start, end = end, end + size
        if not size:
            for grad in (dw1, db1, dw2, db2) if hidden_grads else (dw2, db2):
                grad[e] = 0
            continue
        x_e, drow_e = x_rows[start:end], drows[start:end]
        pre_e = pre[start:end] if len(pre) else torch.addmm(b1[e], x_e, w1[e].t())
        torch.mm(drow_e.t(), act(pre_e, buffer[:size]), out=dw2[e])
        torch.sum(drow_e, 0, out=db2[e])
        if hidden_grads:
            dpre_e = act_backward(torch.mm(drow_e, w2[e], out=buffer[:size]), pre_e)
            torch.mm(dpre_e.t(), x_e, out=dw1[e])
            torch.sum(dpre_e, 0, out=db1[e])
            torch.mm(dpre_e, w1[e], out=dx_rows[start:end])
    dx = sum_slots(dx_rows, slots, filled, expert_ids) if hidden_grads else dx_rows
    return dx, dw1, db1, dw2, db2, dgates.view_as(gates)


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
def _(dy, x, w1, b1, w2, expert_ids, gates, slots, offsets, rows, pre, activation, hidden_grads):
    dx = x.new_empty(x.shape if hidden_grads else (0, x.shape[1]))
    dw1, db1 = (p.new_empty(p.shape if hidden_grads else 0) for p in (w1, b1))
    db2 = w2.new_empty(w2.shape[:2])
    return dx, dw1, db1, w2.new_empty(w2.shape), db2, gates.new_empty(gates.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, w1, b1, w2, _, expert_ids, gates, ctx.activation, *_ = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(x, w1, b1, w2, expert_ids, gates, *kept)


def _differentiate(ctx, dy, *_):
    needs = ctx.needs_input_grad
    dx, dw1, db1, dw2, db2, dgates = grouped_backward_op(
        dy, *ctx.saved_tensors, ctx.activation, any(needs[:3])
    )
    grads = (dx, dw1, db1, dw2, db2, None, dgates, None, None, None)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


grouped_op.register_autograd(_differentiate, setup_context=_setup_context)
