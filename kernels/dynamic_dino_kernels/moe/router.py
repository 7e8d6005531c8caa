"""The router on Triton as a PyTorch operator: logits, softmax, the k best experts, their gates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .tiles import block_size


def triton_route(tokens: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `dynamic_dino_kernels.moe.route`, which has checked the arguments."""
    probs, gates, ids = route_op(tokens.contiguous(), weight.contiguous(), top_k)
    return ids, gates, probs


def forward(tokens: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    (count, dim), experts = tokens.shape, len(weight)
    ids = tokens.new_empty(count, top_k, dtype=torch.int32)
    gates = tokens.new_empty(count, top_k, dtype=torch.float32)
    probs = tokens.new_empty(count, experts, dtype=torch.float32)
    launch(
        route_tokens, (triton.cdiv(count, 32),), tokens, weight, ids, gates, probs, count, experts,
        D=dim, TOP_K=top_k, EXPERTS=block_size(experts), BLOCK_D=64,
        SLOTS=triton.next_power_of_2(top_k), TOKENS=32, num_warps=4,
    )  # fmt: skip
    return probs, gates, ids


route_op = torch.library.custom_op("dynamic_dino::route", forward, mutates_args=())


@route_op.register_fake
def _(tokens, weight, top_k):
    count = len(tokens)
    return (
        tokens.new_empty(count, len(weight), dtype=torch.float32),
        tokens.new_empty(count, top_k, dtype=torch.float32),
        tokens.new_empty(count, top_k, dtype=torch.int32),
    )


def _setup_context(ctx, inputs, output) -> None:
    tokens, weight, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(tokens, weight, *output)


def _differentiate(ctx, dprobs, dgates, _):
    """Both softmaxes back to the logits, and through the linear layer."""
    tokens, weight, probs, gates, ids = ctx.saved_tensors
    soft = gates / gates.shape[1]
    dsoft = dgates * gates.shape[1]
    chosen = soft * (dsoft - (dsoft * soft).sum(1, keepdim=True))
    dlogits = probs * (dprobs - (dprobs * probs).sum(1, keepdim=True))
    ids = ids.long()  # distinct in a row, so this needs no atomics
    dlogits = dlogits.scatter(1, ids, dlogits.gather(1, ids) + chosen)
    dtokens = (dlogits @ weight.float()).to(tokens.dtype) if ctx.needs_input_grad[0] else None
    dweight = (dlogits.T @ tokens.float()).to(weight.dtype) if ctx.needs_input_grad[1] else None
    return dtokens, dweight, None


route_op.register_autograd(_differentiate, setup_context=_setup_context)


@triton.jit
def route_tokens(
    tokens,
    weight,
    ids,
    gates,
    probs,
    count,
    experts,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A block of tokens. Every column of the product sums in the same order: ties stay ties."""
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    e = tl.arange(0, EXPERTS)
    live, real = t < count, e < experts
    logits = tl.zeros([TOKENS, EXPERTS], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_d = d < D
        x = tl.load(
            tokens + t[:, None] * D + d[None, :], mask=live[:, None] & in_d[None, :], other=0.0
        )
        w = tl.load(
            weight + e[None, :] * D + d[:, None], mask=real[None, :] & in_d[:, None], other=0.0
        )
        logits = tl.dot(x.to(tl.float32), w.to(tl.float32), logits, input_precision="ieee")

    logits = tl.where(real[None, :], logits, float("-inf"))
    best = tl.max(logits, 1)
    grown = tl.exp(logits - best[:, None])
    tl.store(
        probs + t[:, None] * experts + e[None, :],
        grown / tl.sum(grown, 1)[:, None],
        mask=live[:, None] & real[None, :],
    )

    k = tl.arange(0, SLOTS)
    chosen = tl.zeros([TOKENS, SLOTS], tl.int32)
    weights = tl.zeros([TOKENS, SLOTS], tl.float32)
    free = real[None, :] & (t >= 0)[:, None]
    for slot in tl.static_range(TOP_K):
        top = tl.max(tl.where(free, logits, float("-inf")), 1)
        # Of equals the lowest; NaN equals nothing and takes the lowest that are free.
        equal = free & (logits == top[:, None])
        index = tl.min(tl.where(equal, e[None, :], EXPERTS), 1)
        lowest = tl.min(tl.where(free, e[None, :], EXPERTS), 1)
        index = tl.where(index == EXPERTS, lowest, index)
        free = free & (e[None, :] != index[:, None])
        here = (k == slot)[None, :]
        chosen = tl.where(here, index[:, None], chosen)
        weights = tl.where(here, tl.exp(top - best)[:, None], weights)
    weights = weights * (TOP_K / tl.sum(weights, 1))[:, None]
    at = t[:, None] * TOP_K + k[None, :]
    mask = live[:, None] & (k < TOP_K)[None, :]
    tl.store(ids + at, chosen, mask=mask)
    tl.store(gates + at, weights, mask=mask)
