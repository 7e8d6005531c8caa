"""The expert FFN in plain torch: the loop that papers write, and the grouped form that is fast.

Both take what `expert_ffn` has checked: one dtype for x and the weights, gates that are zero in
empty slots, no autocast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_aten = torch.ops.aten
# name -> (function, gradient of the loss at its input given that at its output and the input)
ACTIVATIONS = {
    "relu": (F.relu, lambda grad, pre: _aten.threshold_backward(grad, pre, 0)),
    "gelu": (F.gelu, _aten.gelu_backward),
    "silu": (F.silu, _aten.silu_backward),
}


def sequential(x, w1, b1, w2, b2, expert_ids, gates, activation: str) -> Tensor:
    """Loops over all experts: select the expert's tokens, run them, add the result.

    The implementation that Dynamic-DINO times (109 -> 98 FPS) and that benchmarks compare with.
    """
    act, _ = ACTIVATIONS[activation]
    y = torch.zeros_like(x, dtype=_accumulator(x, gates))
    for expert, weights in enumerate(zip(w1.unbind(), b1.unbind(), w2.unbind(), b2.unbind())):
        w1_e, b1_e, w2_e, b2_e = weights
        token, slot = torch.where(expert_ids == expert)
        y_e = F.linear(act(F.linear(x.index_select(0, token), w1_e, b1_e)), w2_e, b2_e)
        y = y.index_add(0, token, (gates[token, slot, None] * y_e).to(y.dtype))
    return y.to(x.dtype)


def grouped(x, w1, b1, w2, b2, expert_ids, gates, activation: str) -> Tensor:
    """Sorts the slots by expert once, then one pair of matmuls per expert that has tokens.

    Deterministic: results return to their tokens by a gather and a sum over K, never by atomics.
    """
    return _GroupedFFN.apply(x, w1, b1, w2, b2, expert_ids, gates, activation)


def _accumulator(x: Tensor, gates: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, gates.dtype), torch.float32)


class _Plan(NamedTuple):
    """The order in which N filled slots are processed: by expert, then by token.

    order     int64 [N], index into the flattened [T, K] slots
    position  int64 [T * K], the row of each slot in that order; N for an empty slot
    blocks    (expert, start, end) of each expert that has tokens
    idle      experts without tokens
    """

    order: Tensor
    position: Tensor
    blocks: list[tuple[int, int, int]]
    idle: list[int]


def _plan(expert_ids: Tensor, num_experts: int) -> _Plan:
    flat = expert_ids.reshape(-1)
    empty, *counts = torch.bincount(flat + 1, minlength=num_experts + 1).tolist()
    order = torch.argsort(flat, stable=True)[empty:]
    filled = order.numel()
    position = torch.full_like(flat, filled, dtype=torch.int64)
    position[order] = torch.arange(filled, device=flat.device)

    blocks, idle, start = [], [], 0
    for expert, count in enumerate(counts):
        if count:
            blocks.append((expert, start, start + count))
        else:
            idle.append(expert)
        start += count
    return _Plan(order, position, blocks, idle)


class _GroupedFFN(torch.autograd.Function):
    """Written out by hand so that each expert's weight gradient lands in its slice of one buffer.

    Autograd would build sixteen small gradients and stack them, which costs more memory traffic
    than the matmuls. Rows beyond the last filled slot are zeros: empty slots read them.
    """

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, expert_ids, gates, activation):
        act, _ = ACTIVATIONS[activation]
        tokens, slots = expert_ids.shape
        plan = _plan(expert_ids, w1.shape[0])
        filled = plan.order.numel()
        rows = x.index_select(0, plan.order.div(max(slots, 1), rounding_mode="floor"))

        pre = x.new_empty(filled, w1.shape[1])
        out = x.new_empty(filled + 1, x.shape[1])
        out[filled:].zero_()
        for e, start, end in plan.blocks:
            torch.addmm(b1[e], rows[start:end], w1[e].t(), out=pre[start:end])
            torch.addmm(b2[e], act(pre[start:end]), w2[e].t(), out=out[start:end])

        ctx.save_for_backward(rows, pre, out, w1, w2, gates, plan.order, plan.position)
        ctx.blocks, ctx.idle, ctx.activation = plan.blocks, plan.idle, activation
        of_slot = out.index_select(0, plan.position).view(tokens, slots, -1)
        dtype = _accumulator(x, gates)
        return (of_slot * gates.to(dtype).unsqueeze(-1)).sum(1).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        rows, pre, out, w1, w2, gates, order, position = ctx.saved_tensors
        act, act_backward = ACTIVATIONS[ctx.activation]
        need_x, need_w1, need_b1, need_w2, need_b2, _, need_gates, _ = ctx.needs_input_grad
        tokens, slots = gates.shape
        filled = order.numel()
        dtype = _accumulator(rows, gates)

        dy_rows = dy.index_select(0, order.div(max(slots, 1), rounding_mode="floor"))
        dgates = None
        if need_gates:
            per_row = (dy_rows.to(dtype) * out[:filled]).sum(-1)
            per_row = torch.cat([per_row, per_row.new_zeros(1)])
            dgates = per_row.index_select(0, position).view(tokens, slots).to(gates.dtype)
        gate_rows = gates.reshape(-1).index_select(0, order).unsqueeze(-1)
        dout = (dy_rows * gate_rows.to(dtype)).to(rows.dtype)

        drows = rows.new_empty(filled + 1, rows.shape[1]) if need_x else None
        dw1 = torch.empty_like(w1) if need_w1 else None
        dw2 = torch.empty_like(w2) if need_w2 else None
        db1 = w1.new_empty(w1.shape[:2]) if need_b1 else None
        db2 = w2.new_empty(w2.shape[:2]) if need_b2 else None
        for e, start, end in ctx.blocks:
            pre_e, dout_e = pre[start:end], dout[start:end]
            if need_w2:
                torch.mm(dout_e.t(), act(pre_e), out=dw2[e])
            if need_b2:
                torch.sum(dout_e, 0, out=db2[e])
            if not (need_x or need_w1 or need_b1):
                continue
            dpre_e = act_backward(dout_e @ w2[e], pre_e)
            if need_w1:
                torch.mm(dpre_e.t(), rows[start:end], out=dw1[e])
            if need_b1:
                torch.sum(dpre_e, 0, out=db1[e])
            if need_x:
                torch.mm(dpre_e, w1[e], out=drows[start:end])

        for grad in (dw1, db1, dw2, db2):
            if grad is not None:
                for e in ctx.idle:
                    grad[e].zero_()
        dx = None
        if need_x:
            drows[filled:].zero_()
            dx = drows.index_select(0, position).view(tokens, slots, -1).sum(1)
        return dx, dw1, db1, dw2, db2, None, dgates, None
