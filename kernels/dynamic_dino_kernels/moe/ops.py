"""The expert FFN on Triton as PyTorch operators: launches, gradients, shapes without data."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..launch import launch, sum_dtype, sum_type
from . import kernels
from .grouped import needs_grad
from .plan import TOKENS, Plan, make_plan, max_tiles
from .precision import precision_of
from .tiles import SMALLEST, Problem, Tiles, block_side, block_size, run_fitting


class Norm(NamedTuple):
    """The end of a transformer's FFN block, LayerNorm(residual + y): residual [T, D], and weight
    [D], bias [D] and eps of the norm, in whose dtype the result is."""

    residual: Tensor
    weight: Tensor
    bias: Tensor
    eps: float


def triton_ffn(
    x,
    w1,
    b1,
    w2,
    b2,
    expert_ids,
    gates,
    activation: str,
    recompute: bool = False,
    counts: Tensor | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """See `dynamic_dino_kernels.moe.expert_ffn`, which has checked the arguments.

    recompute: the backward pass computes the hidden layer again instead of keeping it.
    counts: the router's, see `make_plan`.
    """
    tokens, experts = x.shape[0], w1.shape[0]
    if counts is not None and counts.shape != ((tokens + TOKENS - 1) // TOKENS, experts + 1):
        raise ValueError(
            f"counts {list(counts.shape)} were made for other ids than these of T={tokens} tokens "
            f"and E={experts} experts"
        )
    tensors = [t.contiguous() for t in (x, w1, b1, w2, b2, expert_ids, gates)]
    *tail, eps = norm or (None, None, None, 0.0)
    tail = [t if t is None else t.contiguous() for t in (counts, *tail)]
    save = needs_grad(*(t for t in (*tensors, *tail) if t is not None))
    return expert_ffn_op(*tensors, *tail, eps, activation, save, save and not recompute)[0]


# ---- operators ----------------------------------------------------------------------------------


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    counts: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    save: bool,
    save_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y [T, D], and what the backward pass needs: the plan's slots [N] and offsets [E + 1];
    the hidden layer before the activation, [N, H] by row; of the norm the input [T, D], and mean
    and 1 / deviation, [2, T]. What isn't saved is empty. All arguments are contiguous."""
    call = _Call(x, w1, expert_ids, activation)
    plan = make_plan(expert_ids, call.experts, counts)
    z = x.new_empty(call.n if save_hidden else 0, call.hidden)

    def run(tiles: Tiles) -> Tensor:
        form = _fused if tiles.form == "fused" else _two_gemms
        return form(call, tiles, plan, x, w1, b1, w2, b2, z)

    rows = run_fitting(call.problem(), x.device, run)
    norm = None if residual is None else Norm(residual, norm_weight, norm_bias, eps)
    y, *of_norm = _combine(rows, expert_ids, gates, x, norm, save)
    return y, *plan, z, *of_norm


def backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    slots: Tensor,
    offsets: Tensor,
    z: Tensor,
    activation: str,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, b1, w2, b2 and gates; without `weights`, the four are empty."""
    call, plan = _Call(x, w1, expert_ids, activation, backward=True), Plan(slots, offsets)
    saved = len(z) == call.n
    z = z if saved else x.new_empty(call.n, call.hidden)
    dz = torch.empty_like(z)

    def run(tiles: Tiles) -> tuple[Tensor, Tensor]:
        part, splits = _split(call.hidden, tiles)
        dx_rows = x.new_empty(splits, call.n, call.dim, dtype=_row_dtype(x, splits))
        dgates = x.new_empty(splits, call.n, dtype=sum_dtype(x))
        launch(
            kernels.ffn_backward_rows,
            (max_tiles(call.n, call.experts, tiles.rows), splits),
            *(x, w1, b1, w2, b2, dy, gates, *plan, z, dz, dx_rows, dgates),
            *(call.n, call.top_k, call.experts),
            **call.sizes, **call.numerics, **call.tile(tiles), PART=part, SAVED=saved,
        )  # fmt: skip
        return dx_rows, dgates

    dx_rows, dgates = run_fitting(call.problem(), x.device, run)
    dx = _combine(dx_rows, expert_ids, None, x)[0]
    # Empty slots have no row: what is at their place was never written.
    dgate = dgates.sum(0).view_as(gates).masked_fill(expert_ids < 0, 0).to(gates.dtype)

    grads = [p.new_empty(p.shape if weights else 0) for p in (w1, b1, w2, b2)]
    if weights:
        block = min(block_side(x.dtype), max(block_size(call.dim), block_size(call.hidden)))
        launch(
            kernels.ffn_backward_weights,
            (call.experts, triton.cdiv(call.hidden, block), triton.cdiv(call.dim, block)),
            *(x, dy, gates, *plan, z, dz, *grads, call.top_k),
            **call.sizes, **call.numerics, BLOCK_D=block, BLOCK_H=block,
            ROWS=max(SMALLEST, block // 2), num_warps=4, num_stages=2,
        )  # fmt: skip
    return dx, *grads, dgate


expert_ffn_op = torch.library.custom_op("dynamic_dino::expert_ffn", forward, mutates_args=())
expert_ffn_backward_op = torch.library.custom_op(
    "dynamic_dino::expert_ffn_backward", backward, mutates_args=()
)


@expert_ffn_op.register_fake
def _(
    x, w1, b1, w2, b2, expert_ids, gates, counts, residual, norm_weight, norm_bias, eps, activation,
    save, save_hidden,
):  # fmt: skip
    n = expert_ids.shape[0] * expert_ids.shape[1]
    slots, offsets = (expert_ids.new_empty(k, dtype=torch.int32) for k in (n, w1.shape[0] + 1))
    z = x.new_empty(n if save_hidden else 0, w1.shape[1])
    y = x.new_empty(x.shape, dtype=x.dtype if residual is None else norm_weight.dtype)
    kept = x.shape[0] if save and residual is not None else 0
    stats = x.new_empty(2, kept, dtype=sum_dtype(x))
    return y, slots, offsets, z, y.new_empty(kept, y.shape[1]), stats


@expert_ffn_backward_op.register_fake
def _(dy, x, w1, b1, w2, b2, expert_ids, gates, slots, offsets, z, activation, weights):
    grads = [p.new_empty(p.shape if weights else 0) for p in (w1, b1, w2, b2)]
    return x.new_empty(x.shape), *grads, gates.new_empty(gates.shape)


def _setup_context(ctx, inputs, output) -> None:
    *ffn, _, residual, norm_weight, norm_bias, _, ctx.activation, _, _ = inputs
    _, slots, offsets, z, *of_norm = output
    ctx.mark_non_differentiable(slots, offsets, z, *of_norm)
    ctx.normed = residual is not None
    ctx.residual_dtype = residual.dtype if ctx.normed else None
    norm = (norm_weight, norm_bias, *of_norm) if ctx.normed else ()
    ctx.save_for_backward(*ffn, slots, offsets, z, *norm)


def _differentiate(ctx, dy, *_):
    *ffn, slots, offsets, z = ctx.saved_tensors[:10]
    needs, (x, *_) = ctx.needs_input_grad, ffn
    dresidual = dnorm_weight = dnorm_bias = None
    if ctx.normed:
        weight, bias, summed, (mean, rstd) = ctx.saved_tensors[10:]
        dy, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
            dy, summed, [dy.shape[1]], mean[:, None], rstd[:, None], weight, bias, [True] * 3
        )
        dresidual = dy.to(ctx.residual_dtype)
    dx, dw1, db1, dw2, db2, dgates = expert_ffn_backward_op(
        dy.to(x.dtype).contiguous(), *ffn, slots, offsets, z, ctx.activation, any(needs[1:5])
    )
    norm_grads = (dresidual, dnorm_weight, dnorm_bias)
    grads = (dx, dw1, db1, dw2, db2, None, dgates, None, *norm_grads, *[None] * 4)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


expert_ffn_op.register_autograd(_differentiate, setup_context=_setup_context)


# ---- launches -----------------------------------------------------------------------------------


class _Call:
    """The sizes of one call, and the keyword arguments that its kernels have in common."""

    def __init__(
        self, x: Tensor, w1: Tensor, expert_ids: Tensor, activation: str, backward: bool = False
    ) -> None:
        self.experts, self.hidden, self.dim = w1.shape
        self.top_k, self.n = expert_ids.shape[1], expert_ids.numel()
        self.dtype, self.backward, precision = x.dtype, backward, precision_of(x, backward)
        self.sizes = dict(D=self.dim, H=self.hidden)
        self.numerics = dict(ACTIVATION=activation, SUM=sum_type(x), PRECISION=precision)

    def problem(self) -> Problem:
        sizes = (self.n, self.experts, self.dim, self.hidden)
        return Problem(*sizes, self.dtype, self.backward, self.top_k, self.numerics["PRECISION"])

    def tile(self, tiles: Tiles) -> dict:
        return dict(
            EXPERTS=block_size(self.experts, 2), BLOCK_D=block_size(self.dim), ROWS=tiles.rows,
            BLOCK_H=tiles.hidden, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip


def _fused(call: _Call, tiles: Tiles, plan: Plan, x, w1, b1, w2, b2, z: Tensor) -> Tensor:
    """[splits, N, D] by slot; fills z if it has room."""
    part, splits = _split(call.hidden, tiles)
    rows = x.new_empty(splits, call.n, call.dim, dtype=_row_dtype(x, splits))
    launch(
        kernels.fused_ffn,
        (max_tiles(call.n, call.experts, tiles.rows), splits),
        *(x, w1, b1, w2, b2, *plan, rows, z, call.n, call.top_k, call.experts),
        **call.sizes, **call.numerics, **call.tile(tiles), PART=part, SAVE=len(z) > 0,
    )  # fmt: skip
    return rows


def _two_gemms(call: _Call, tiles: Tiles, plan: Plan, x, w1, b1, w2, b2, z: Tensor) -> Tensor:
    """[1, N, D] by slot; fills z if it has room."""
    z = z if len(z) else x.new_empty(call.n, call.hidden)
    rows = x.new_empty(1, call.n, call.dim)
    numerics = dict(SUM=call.numerics["SUM"], PRECISION=call.numerics["PRECISION"])
    meta = dict(
        EXPERTS=block_size(call.experts, 2), ROWS=tiles.rows, **numerics,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    block_out = [min(2 * block_side(x.dtype), block_size(size)) for size in (call.hidden, call.dim)]
    block_in = [min(block_side(x.dtype), block_size(size)) for size in (call.dim, call.hidden)]
    count = max_tiles(call.n, call.experts, tiles.rows)
    launch(
        kernels.grouped_linear,
        (triton.cdiv(call.hidden, block_out[0]), count),
        *(x, w1, b1, *plan, z, call.top_k, call.experts),
        IN=call.dim, OUT=call.hidden, GATHER=True, ACTIVATION="none",
        BLOCK_OUT=block_out[0], BLOCK_IN=block_in[0], **meta,
    )  # fmt: skip
    launch(
        kernels.grouped_linear,
        (triton.cdiv(call.dim, block_out[1]), count),
        *(z, w2, b2, *plan, rows, call.top_k, call.experts),
        IN=call.hidden, OUT=call.dim, GATHER=False, ACTIVATION=call.numerics["ACTIVATION"],
        BLOCK_OUT=block_out[1], BLOCK_IN=block_in[1], **meta,
    )  # fmt: skip
    return rows


def _combine(
    rows: Tensor,
    expert_ids: Tensor,
    gates: Tensor | None,
    x: Tensor,
    norm: Norm | None = None,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """[splits, N, D] by slot -> [T, D] like x, weighted by the gates if given, residual added and
    normed if asked for; with `save`, the norm's input and statistics for its backward pass."""
    (splits, n, dim), (tokens, top_k) = rows.shape, expert_ids.shape
    y = x.new_empty(x.shape, dtype=norm.weight.dtype if norm else x.dtype)
    kept = tokens if norm and save else 0
    summed = y.new_empty(kept, dim)
    stats = x.new_empty(2, kept, dtype=sum_dtype(x))
    block = block_size(dim) if norm else min(256, block_size(dim))  # a norm needs the whole row
    unused = expert_ids
    residual, weight, bias, eps = norm or (unused, unused, unused, 0.0)
    launch(
        kernels.combine_slots,
        (triton.cdiv(tokens, 4), triton.cdiv(dim, block)),
        *(rows, expert_ids, unused if gates is None else gates),
        *(residual, weight, bias, y, summed, stats, tokens, n),
        TOP_K=top_k, SPLITS=splits, D=dim, GATED=gates is not None, NORM=norm is not None,
        EPS=eps, SAVE=kept > 0, SUM=sum_type(x), BLOCK_D=block, TOKENS=4, num_warps=4,
    )  # fmt: skip
    return y, summed, stats


def _split(hidden: int, tiles: Tiles) -> tuple[int, int]:
    """Hidden units of each split, a multiple of the block, and how many splits that makes."""
    part = triton.cdiv(triton.cdiv(hidden, tiles.splits), tiles.hidden) * tiles.hidden
    return part, triton.cdiv(hidden, part)


def _row_dtype(x: Tensor, splits: int) -> torch.dtype:
    """Parts of a sum are kept wide; a whole result is rounded as a linear layer's is."""
    return sum_dtype(x) if splits > 1 else x.dtype
