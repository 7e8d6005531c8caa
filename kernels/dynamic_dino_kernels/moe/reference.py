"""Router and expert FFN in plain torch: the loop of the papers, and a grouped form that is fast.

They take what `route` and `expert_ffn` have checked: one dtype for x and the weights, no autocast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_aten = torch.ops.aten
# name -> (function with `out`, gradient of the loss at its input given that at its output and the
# input)
ACTIVATIONS = {
    "relu": (
        lambda pre, out=None: torch.clamp_min(pre, 0, out=out),
        lambda grad, pre: _aten.threshold_backward(grad, pre, 0),
    ),
    "gelu": (
        lambda pre, out=None: F.gelu(pre) if out is None else _aten.gelu.out(pre, out=out),
        _aten.gelu_backward,
    ),
    "silu": (
        lambda pre, out=None: F.silu(pre) if out is None else _aten.silu.out(pre, out=out),
        _aten.silu_backward,
    ),
}


def route(tokens: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Summed in float64: equal rows of the weight then give equal float32 logits, whatever the
    order of summation that the matrix library chooses for a column."""
    logits = (tokens.double() @ weight.double().T).float()
    # A stable sort breaks ties by the lowest index, which topk doesn't promise.
    order = torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices
    ids = order[:, :top_k]
    return ids.int(), logits.gather(1, ids).softmax(-1) * top_k, logits.softmax(-1)


def sequential(x, w1, b1, w2, b2, expert_ids, gates, activation: str) -> Tensor:
    """Loops over all experts: select the expert's tokens, run them, add the result.

    The implementation that Dynamic-DINO times (109 -> 98 FPS) and that benchmarks compare with.
    """
    act, _ = ACTIVATIONS[activation]
    y = torch.zeros_like(x, dtype=_accumulator(x, gates))
    experts = zip(w1.unbind(), b1.unbind(), w2.unbind(), b2.unbind(), strict=True)
    for expert, (w1_e, b1_e, w2_e, b2_e) in enumerate(experts):
        token, slot = torch.where(expert_ids == expert)
        y_e = F.linear(act(F.linear(x.index_select(0, token), w1_e, b1_e)), w2_e, b2_e)
        y = y.index_add(0, token, (gates[token, slot, None] * y_e).to(y.dtype))
    return y.to(x.dtype)


def grouped(x, w1, b1, w2, b2, expert_ids, gates, activation: str) -> Tensor:
    """Sorts the slots by expert once, then one pair of matmuls per expert that has tokens.

    Deterministic: results return to their tokens by a gather and a sum over K, never by atomics.
    """
    gates = gates.masked_fill(expert_ids < 0, 0)
    save = needs_grad(x, w1, b1, w2, b2, gates)
    return _GroupedFFN.apply(x, w1, b1, w2, b2, expert_ids, gates, activation, save)


def needs_grad(*tensors: Tensor) -> bool:
    """Whether a backward pass may follow, for which things must be kept."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _accumulator(x: Tensor, gates: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, gates.dtype), torch.float32)


class _Plan(NamedTuple):
    """The order in which N filled slots are processed: by expert, then by token.

    token     int64 [N], the token of each row
    slot      int64 [N], the index of each row in the flattened [T, K] slots
    position  int64 [T, K], the row of each slot; N for an empty slot
    blocks    (expert, start, end) of each expert that has tokens
    idle      experts without tokens
    """

    token: Tensor
    slot: Tensor
    position: Tensor
    blocks: list[tuple[int, int, int]]
    idle: list[int]


def _plan(expert_ids: Tensor, num_experts: int) -> _Plan:
    flat = expert_ids.reshape(-1)
    empty, *counts = torch.bincount(flat + 1, minlength=num_experts + 1).tolist()
    slot = torch.argsort(flat, stable=True)[empty:]
    token = slot.div(max(expert_ids.shape[1], 1), rounding_mode="floor")
    position = torch.full_like(flat, slot.numel(), dtype=torch.int64)
    position[slot] = torch.arange(slot.numel(), device=flat.device)

    blocks, idle, start = [], [], 0
    for expert, count in enumerate(counts):
        if count:
            blocks.append((expert, start, start + count))
        else:
            idle.append(expert)
        start += count
    return _Plan(token, slot, position.view_as(expert_ids), blocks, idle)


def _sum_slots(rows: Tensor, position: Tensor, gates: Tensor | None = None) -> Tensor:
    """[N + 1, D] -> [T, D]: sums each token's rows, with weights if given. The last row is zero."""
    if position.numel() == 0:
        return rows.new_zeros(position.shape[0], rows.shape[1])
    rows[-1].zero_()
    return F.embedding_bag(position, rows, mode="sum", per_sample_weights=gates)


class _GroupedFFN(torch.autograd.Function):
    """Written out by hand so that each expert's weight gradient lands in its slice of one buffer.

    Autograd would build sixteen small gradients and stack them. Everything else happens expert by
    expert, on a few hundred rows that stay in the cache.
    """

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, expert_ids, gates, activation, save):
        act, _ = ACTIVATIONS[activation]
        plan = _plan(expert_ids, w1.shape[0])
        gates_x = gates.to(x.dtype)

        # Fresh memory costs page faults: all experts share their buffers, but for what is kept.
        largest = max((end - start for _, start, end in plan.blocks), default=0)
        x_rows = x.new_empty(largest, x.shape[1])
        hidden = x.new_empty(largest, w1.shape[1])
        pre = x.new_empty(plan.token.numel(), w1.shape[1]) if save else None
        out = x.new_empty(plan.token.numel() + 1, x.shape[1])
        for e, start, end in plan.blocks:
            n = end - start
            x_e = torch.index_select(x, 0, plan.token[start:end], out=x_rows[:n])
            pre_e = pre[start:end] if save else hidden[:n]
            torch.addmm(b1[e], x_e, w1[e].t(), out=pre_e)
            torch.addmm(b2[e], act(pre_e, out=hidden[:n]), w2[e].t(), out=out[start:end])

        ctx.save_for_backward(x, pre, out, w1, w2, gates, plan.token, plan.slot, plan.position)
        ctx.blocks, ctx.idle, ctx.activation = plan.blocks, plan.idle, activation
        return _sum_slots(out, plan.position, gates_x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, pre, out, w1, w2, gates, token, slot, position = ctx.saved_tensors
        act, act_backward = ACTIVATIONS[ctx.activation]
        need_x, need_w1, need_b1, need_w2, need_b2, _, need_gates, _, _ = ctx.needs_input_grad

        gate = gates.to(x.dtype).reshape(-1, 1).index_select(0, slot)
        dgates = gates.new_zeros(gates.shape) if need_gates else None
        dx_rows = x.new_empty(token.numel() + 1, x.shape[1]) if need_x else None
        dw1 = torch.empty_like(w1) if need_w1 else None
        db1 = w1.new_empty(w1.shape[:2]) if need_b1 else None
        dw2 = torch.empty_like(w2) if need_w2 else None
        db2 = w2.new_empty(w2.shape[:2]) if need_b2 else None

        for e, start, end in ctx.blocks:
            pre_e = pre[start:end]
            dy_e = dy.index_select(0, token[start:end])
            if need_gates:
                dgate_e = (dy_e * out[start:end]).sum(-1, dtype=gates.dtype)
                dgates.view(-1)[slot[start:end]] = dgate_e
            dout_e = dy_e.mul_(gate[start:end])
            if need_w2:
                torch.mm(dout_e.t(), act(pre_e), out=dw2[e])
            if need_b2:
                torch.sum(dout_e, 0, out=db2[e])
            if not (need_x or need_w1 or need_b1):
                continue
            dpre_e = act_backward(dout_e @ w2[e], pre_e)
            if need_w1:
                torch.mm(dpre_e.t(), x.index_select(0, token[start:end]), out=dw1[e])
            if need_b1:
                torch.sum(dpre_e, 0, out=db1[e])
            if need_x:
                torch.mm(dpre_e, w1[e], out=dx_rows[start:end])

        for grad in (dw1, db1, dw2, db2):
            if grad is not None:
                grad[ctx.idle] = 0
        dx = _sum_slots(dx_rows, position) if need_x else None
        return dx, dw1, db1, dw2, db2, None, dgates, None, None
