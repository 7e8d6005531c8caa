"""The expert FFN on Triton as PyTorch operators: launches, gradients, shapes without data."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..launch import launch, sum_dtype, sum_type
from . import kernels
from .plan import Plan, make_plan, max_tiles
from .reference import needs_grad
from .tiles import SMALLEST, Problem, Tiles, block_size, choose_tiles


def triton_ffn(
    x, w1, b1, w2, b2, expert_ids, gates, activation: str, recompute: bool = False
) -> Tensor:
    """See `dynamic_dino_kernels.moe.expert_ffn`, which has checked the arguments.

    recompute: the backward pass computes the hidden layer again instead of keeping it.
    """
    save = needs_grad(x, w1, b1, w2, b2, gates) and not recompute
    tensors = (t.contiguous() for t in (x, w1, b1, w2, b2, expert_ids, gates))
    return expert_ffn_op(*tensors, activation, save)[0]


# ---- operators ----------------------------------------------------------------------------------


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y [T, D], the plan's slots [N] and offsets [E + 1], and the hidden layer before the
    activation, [N, H] by row; without `save` it is empty. All arguments are contiguous."""
    call = _Call(x, w1, expert_ids, activation)
    plan = make_plan(expert_ids, call.experts)
    z = x.new_empty(call.n if save else 0, call.hidden)
    tiles = choose_tiles(call.problem(backward=False), x.device)
    run = _fused if tiles.form == "fused" else _two_gemms
    rows = run(call, tiles, plan, x, w1, b1, w2, b2, z)
    return _combine(rows, expert_ids, gates, x), *plan, z


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
    call, plan = _Call(x, w1, expert_ids, activation), Plan(slots, offsets)
    saved = len(z) == call.n
    z = z if saved else x.new_empty(call.n, call.hidden)
    dz = torch.empty_like(z)
    tiles = choose_tiles(call.problem(backward=True), x.device)
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
    dx = _combine(dx_rows, expert_ids, None, x)
    # Empty slots have no row: what is at their place was never written.
    dgate = dgates.sum(0).view_as(gates).masked_fill(expert_ids < 0, 0).to(gates.dtype)

    grads = [p.new_empty(p.shape if weights else 0) for p in (w1, b1, w2, b2)]
    if weights:
        block = min(_side(x), max(block_size(call.dim), block_size(call.hidden)))
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
def _(x, w1, b1, w2, b2, expert_ids, gates, activation, save):
    n = expert_ids.shape[0] * expert_ids.shape[1]
    slots, offsets = (expert_ids.new_empty(k, dtype=torch.int32) for k in (n, w1.shape[0] + 1))
    return x.new_empty(x.shape), slots, offsets, x.new_empty(n if save else 0, w1.shape[1])


@expert_ffn_backward_op.register_fake
def _(dy, x, w1, b1, w2, b2, expert_ids, gates, slots, offsets, z, activation, weights):
    grads = [p.new_empty(p.shape if weights else 0) for p in (w1, b1, w2, b2)]
    return x.new_empty(x.shape), *grads, gates.new_empty(gates.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.activation, _ = inputs
    _, *plan_and_z = output
    ctx.mark_non_differentiable(*plan_and_z)
    ctx.save_for_backward(*tensors, *plan_and_z)


def _differentiate(ctx, dy, *_):
    grads = expert_ffn_backward_op(
        dy.contiguous(), *ctx.saved_tensors, ctx.activation, any(ctx.needs_input_grad[1:5])
    )
    dx, dw1, db1, dw2, db2, dgates = grads
    grads = (dx, dw1, db1, dw2, db2, None, dgates, None, None)
    return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=True))


expert_ffn_op.register_autograd(_differentiate, setup_context=_setup_context)


# ---- launches -----------------------------------------------------------------------------------


class _Call:
    """The sizes of one call, and the keyword arguments that its kernels have in common."""

    def __init__(self, x: Tensor, w1: Tensor, expert_ids: Tensor, activation: str) -> None:
        self.experts, self.hidden, self.dim = w1.shape
        self.top_k, self.n = expert_ids.shape[1], expert_ids.numel()
        self.dtype = x.dtype
        self.sizes = dict(D=self.dim, H=self.hidden)
        self.numerics = dict(ACTIVATION=activation, SUM=sum_type(x), PRECISION=_precision(x))

    def problem(self, backward: bool) -> Problem:
        return Problem(self.n, self.experts, self.dim, self.hidden, self.dtype, backward)

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
    block_out = [min(2 * _side(x), block_size(size)) for size in (call.hidden, call.dim)]
    block_in = [min(_side(x), block_size(size)) for size in (call.dim, call.hidden)]
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


def _combine(rows: Tensor, expert_ids: Tensor, gates: Tensor | None, x: Tensor) -> Tensor:
    """[splits, N, D] by slot -> [T, D] like x, weighted by the gates if given."""
    (splits, n, dim), (tokens, top_k) = rows.shape, expert_ids.shape
    y = torch.empty_like(x)
    block = min(256, block_size(dim))
    launch(
        kernels.combine_slots,
        (triton.cdiv(tokens, 4), triton.cdiv(dim, block)),
        *(rows, expert_ids, expert_ids if gates is None else gates, y, tokens, n),
        TOP_K=top_k, SPLITS=splits, D=dim, GATED=gates is not None, SUM=sum_type(x),
        BLOCK_D=block, TOKENS=4, num_warps=4,
    )  # fmt: skip
    return y


def _split(hidden: int, tiles: Tiles) -> tuple[int, int]:
    """Hidden units of each split, a multiple of the block, and how many splits that makes."""
    part = triton.cdiv(triton.cdiv(hidden, tiles.splits), tiles.hidden) * tiles.hidden
    return part, triton.cdiv(hidden, part)


def _side(x: Tensor) -> int:
    """Of a block of a weight: 128 bytes, so that what is summed stays in registers."""
    return max(SMALLEST, 128 // x.element_size())


def _precision(x: Tensor) -> str:
    """PyTorch's setting decides whether float32 may be rounded to TF32."""
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def _row_dtype(x: Tensor, splits: int) -> torch.dtype:
    """Parts of a sum are kept wide; a whole result is rounded as a linear layer's is."""
    return sum_dtype(x) if splits > 1 else x.dtype
