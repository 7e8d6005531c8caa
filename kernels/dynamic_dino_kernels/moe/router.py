"""The routers on Triton as PyTorch operators: one kernel from tokens to gates and blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import gpu_of, launch, let_next_start
from ..replay import Replayed
from .plan import TOKENS, blocks_shape
from .tiles import block_size


def triton_route(
    tokens: Tensor, weight: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `dynamic_dino_kernels.moe.route`, which has checked the arguments."""
    tensors = tokens.contiguous(), weight.contiguous()
    gates, probs, ids, blocks = _call(route_op, _route, tensors, (top_k,))
    return ids, gates, probs, blocks


def triton_route_any(
    tokens: Tensor, weight: Tensor, thresholds: Tensor, max_k: int, fallback: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `dynamic_dino_kernels.moe.route_any`, which has checked the arguments."""
    tensors = tuple(t.contiguous() for t in (tokens, weight, thresholds))
    gates, scores, ids, blocks = _call(route_any_op, _route_any, tensors, (max_k, fallback))
    return ids, gates, scores, blocks


def _call(operator, replayed: Replayed, tensors: tuple[Tensor, ...], constants: tuple):
    if not torch.compiler.is_compiling() and (call := replayed.find(tensors, constants)):
        return call()
    return operator(*tensors, *constants)


# ---- operators ----------------------------------------------------------------------------------


def forward(tokens: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gates [T, K], probs [T, E], expert_ids [T, K], sorted blocks, see plan.py."""
    outputs = _empty_outputs(tokens, weight, top_k)
    meta = _meta(tokens, weight, top_k)
    launch(route_top_k, _grid(tokens), tokens, weight, *outputs, len(tokens), len(weight), **meta)
    return outputs


def forward_any(
    tokens: Tensor, weight: Tensor, thresholds: Tensor, max_k: int, fallback: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gates [T, K], scores [T, E], expert_ids [T, K], sorted blocks, see plan.py."""
    outputs = _empty_outputs(tokens, weight, max_k)
    meta = _meta(tokens, weight, max_k) | dict(FALLBACK=fallback)
    sizes = len(tokens), len(weight)
    launch(route_top_any, _grid(tokens), tokens, weight, thresholds, *outputs, *sizes, **meta)
    return outputs


def _empty_outputs(
    tokens: Tensor, weight: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count, experts = tokens.shape[0], len(weight)  # len() of a traced tensor would fix T
    return (
        tokens.new_empty(count, top_k, dtype=torch.float32),
        tokens.new_empty(count, experts, dtype=torch.float32),
        tokens.new_empty(count, top_k, dtype=torch.int32),
        tokens.new_empty(blocks_shape(count, top_k, experts), dtype=torch.int32),
    )


def _grid(tokens: Tensor) -> tuple[int]:
    return (triton.cdiv(len(tokens), TOKENS),)


def _meta(tokens: Tensor, weight: Tensor, top_k: int) -> dict:
    return dict(
        D=tokens.shape[1], TOP_K=top_k, EXPERTS=block_size(len(weight)),
        BLOCK_D=min(128, block_size(tokens.shape[1])),
        SLOTS=triton.next_power_of_2(top_k), BLOCK=TOKENS, num_warps=4,
        PDL=gpu_of(tokens.device).dependent_launch["PDL"],  # lets the next start early; it is first
    )  # fmt: skip


_route, _route_any = Replayed(forward), Replayed(forward_any)
route_op = torch.library.custom_op("dynamic_dino::route", forward, mutates_args=())
route_any_op = torch.library.custom_op("dynamic_dino::route_any", forward_any, mutates_args=())
route_op.register_fake(_empty_outputs)
route_any_op.register_fake(
    lambda tokens, weight, thresholds, max_k, fallback: _empty_outputs(tokens, weight, max_k)
)


def _setup_context(ctx, inputs, output) -> None:
    gates, probs, ids, blocks = output
    ctx.mark_non_differentiable(ids, blocks)
    ctx.save_for_backward(*(i for i in inputs if isinstance(i, Tensor)), gates, probs, ids)


def _differentiate(ctx, dgates, dprobs, *_):
    """Both softmaxes back to the logits, and through the linear layer."""
    tokens, weight, gates, probs, ids = ctx.saved_tensors
    soft = gates / gates.shape[1]
    dsoft = dgates * gates.shape[1]
    chosen = soft * (dsoft - (dsoft * soft).sum(1, keepdim=True))
    dlogits = probs * (dprobs - (dprobs * probs).sum(1, keepdim=True))
    dlogits = dlogits + _spread(chosen, ids, weight)
    dtokens = (dlogits @ weight.float()).to(tokens.dtype) if ctx.needs_input_grad[0] else None
    dweight = (dlogits.T @ tokens.float()).to(weight.dtype) if ctx.needs_input_grad[1] else None
    return dtokens, dweight, None


def _differentiate_any(ctx, dgates, dscores, *_):
    """Straight through the gates of the chosen experts to score and threshold, then the cosine."""
    tokens, weight, thresholds, gates, scores, ids = ctx.saved_tensors
    dmargin = _spread(dgates * gates, ids, weight)  # a gate is 1 / k where there is one
    limit = thresholds.float().sigmoid()
    dthresholds = (-dmargin.sum(0) * limit * (1 - limit)).to(thresholds.dtype)
    dcosine = (dscores + dmargin) * scores * (1 - scores)

    x, x_norm = _unit(tokens)
    w, w_norm = _unit(weight)
    dx, dw = dcosine @ w, dcosine.T @ x
    dtokens = (dx - x * (x * dx).sum(1, keepdim=True)) / x_norm
    dweight = (dw - w * (w * dw).sum(1, keepdim=True)) / w_norm
    return dtokens.to(tokens.dtype), dweight.to(weight.dtype), dthresholds, None, None


def _spread(values: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """[T, K] -> [T, E]: each slot's value at its expert. Experts are distinct in a row, and empty
    slots go to a column that is cut off, so this needs no atomics."""
    column = torch.where(ids < 0, len(weight), ids).long()
    spread = values.new_zeros(values.shape[0], len(weight) + 1).scatter(1, column, values)
    return spread[:, :-1]


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    norm = rows.float().norm(dim=1, keepdim=True).clamp(min=1e-12)
    return rows.float() / norm, norm


route_op.register_autograd(_differentiate, setup_context=_setup_context)
route_any_op.register_autograd(_differentiate_any, setup_context=_setup_context)


# ---- kernels ------------------------------------------------------------------------------------


@triton.jit
def _products(
    tokens,
    weight,
    t,
    e,
    live,
    real,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
):
    """x W^T of a block of tokens. Every column sums in the same order, so that ties stay ties."""
    products = tl.zeros([t.shape[0], e.shape[0]], tl.float32)
    if COSINE:
        x_square = tl.zeros([t.shape[0]], tl.float32)
        w_square = tl.zeros([e.shape[0]], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_d = d < D
        x = tl.load(
            tokens + t[:, None] * D + d[None, :], mask=live[:, None] & in_d[None, :], other=0.0
        ).to(tl.float32)
        w = tl.load(
            weight + e[None, :] * D + d[:, None], mask=real[None, :] & in_d[:, None], other=0.0
        ).to(tl.float32)
        products = tl.dot(x, w, products, input_precision="ieee")
        if COSINE:
            x_square += tl.sum(x * x, 1)
            w_square += tl.sum(w * w, 0)
    if COSINE:
        products /= tl.maximum(tl.sqrt(x_square), 1e-12)[:, None]
        products /= tl.maximum(tl.sqrt(w_square), 1e-12)[None, :]
    return products


@triton.jit
def _best(values, free, e, EXPERTS: tl.constexpr):
    """Of each row's free columns the best value's, and the value; EXPERTS where none is free.

    Of equals the lowest; NaN equals nothing and takes the lowest that are free."""
    top = tl.max(tl.where(free, values, float("-inf")), 1)
    index = tl.min(tl.where(free & (values == top[:, None]), e[None, :], EXPERTS), 1)
    lowest = tl.min(tl.where(free, e[None, :], EXPERTS), 1)
    return tl.where(index == EXPERTS, lowest, index), top


@triton.jit
def _store_block(
    blocks, hits, slot_of, t, e, live, experts, TOP_K: tl.constexpr, SLOTS: tl.constexpr
):
    """The slots of this block of tokens, sorted by expert, as plan.py's `blocks_shape` tells.

    hits: which token takes which expert [BLOCK, EXPERTS]; slot_of: in which of its slots.
    """
    row = blocks + tl.program_id(0).to(tl.int64) * (experts + 1 + hits.shape[0] * TOP_K)
    hits = hits & live[:, None]
    ones = hits.to(tl.int32)
    counts = tl.sum(ones, 0)
    start = tl.cumsum(counts, 0) - counts
    tl.store(row + e, start, mask=e < experts)
    filled = tl.sum(counts, 0)
    tl.store(row + experts, filled)
    index = tl.arange(0, hits.shape[0] * SLOTS)
    rest = (index >= filled) & (index < hits.shape[0] * TOP_K)
    tl.store(row + experts + 1 + index, -1, mask=rest)
    place = start[None, :] + tl.cumsum(ones, 0) - 1
    slot = t[:, None].to(tl.int32) * TOP_K + slot_of
    tl.store(row + experts + 1 + place, slot, mask=hits)


@triton.jit
def route_top_k(
    tokens,
    weight,
    gates,
    probs,
    ids,
    blocks,
    count,
    experts,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Softmax over all experts, the k best of them, and the softmax over those, times k."""
    t = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    e = tl.arange(0, EXPERTS)
    live, real = t < count, e < experts
    logits = _products(tokens, weight, t, e, live, real, D, BLOCK_D, False)
    let_next_start(PDL)
    logits = tl.where(real[None, :], logits, float("-inf"))
    best = tl.max(logits, 1)
    grown = tl.exp(logits - best[:, None])
    tl.store(
        probs + t[:, None] * experts + e[None, :],
        grown / tl.sum(grown, 1)[:, None],
        mask=live[:, None] & real[None, :],
    )

    k = tl.arange(0, SLOTS)
    chosen = tl.zeros([BLOCK, SLOTS], tl.int32)
    weights = tl.zeros([BLOCK, SLOTS], tl.float32)
    offered = real[None, :] & (t >= 0)[:, None]
    free = offered
    slot_of = tl.zeros([BLOCK, EXPERTS], tl.int32)
    for slot in tl.static_range(TOP_K):
        index, top = _best(logits, free, e, EXPERTS)
        taken = e[None, :] == index[:, None]
        free = free & (taken == 0)
        slot_of = tl.where(taken, slot, slot_of)
        here = (k == slot)[None, :]
        chosen = tl.where(here, index[:, None], chosen)
        weights = tl.where(here, tl.exp(top - best)[:, None], weights)
    weights = weights * (TOP_K / tl.sum(weights, 1))[:, None]
    at = t[:, None] * TOP_K + k[None, :]
    mask = live[:, None] & (k < TOP_K)[None, :]
    tl.store(ids + at, chosen, mask=mask)
    tl.store(gates + at, weights, mask=mask)
    _store_block(blocks, offered & (free == 0), slot_of, t, e, live, experts, TOP_K, SLOTS)


@triton.jit
def route_top_any(
    tokens,
    weight,
    thresholds,
    gates,
    scores,
    ids,
    blocks,
    count,
    experts,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    FALLBACK: tl.constexpr,
    PDL: tl.constexpr,
):
    """All experts whose cosine exceeds their threshold, best first, TOP_K at most."""
    t = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    e = tl.arange(0, EXPERTS)
    live, real = t < count, e < experts
    cosine = _products(tokens, weight, t, e, live, real, D, BLOCK_D, True)
    let_next_start(PDL)
    tl.store(
        scores + t[:, None] * experts + e[None, :],
        1 / (1 + tl.exp(-cosine)),
        mask=live[:, None] & real[None, :],
    )

    threshold = tl.load(thresholds + e, mask=real, other=float("inf")).to(tl.float32)
    offered = cosine > threshold[None, :]
    if FALLBACK:
        on = (threshold < float("inf"))[None, :] & (t >= 0)[:, None]
        index, _ = _best(cosine, on, e, EXPERTS)
        none = tl.sum(offered.to(tl.int32), 1) == 0
        offered = offered | (none[:, None] & (e[None, :] == index[:, None]))
    k = tl.arange(0, SLOTS)
    chosen = tl.full([BLOCK, SLOTS], -1, tl.int32)
    free = offered
    slot_of = tl.zeros([BLOCK, EXPERTS], tl.int32)
    for slot in tl.static_range(TOP_K):
        index, _ = _best(cosine, free, e, EXPERTS)
        best = e[None, :] == index[:, None]
        free = free & (best == 0)
        slot_of = tl.where(best, slot, slot_of)
        taken = (k == slot)[None, :] & (index < EXPERTS)[:, None]
        chosen = tl.where(taken, index[:, None], chosen)
    filled = chosen >= 0
    number = tl.maximum(tl.sum(filled.to(tl.int32), 1), 1)
    at = t[:, None] * TOP_K + k[None, :]
    mask = live[:, None] & (k < TOP_K)[None, :]
    tl.store(ids + at, chosen, mask=mask)
    tl.store(gates + at, tl.where(filled, 1.0 / number[:, None], 0.0), mask=mask)
    _store_block(blocks, offered & (free == 0), slot_of, t, e, live, experts, TOP_K, SLOTS)
