"""The expert FFN on Triton as PyTorch operators: launches, gradients, shapes without data."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..launch import gpu_of, launch, sum_dtype, sum_type
from ..replay import Call, Replayed
from . import kernels, router
from .activations import GATED
from .grouped import needs_grad
from .plan import MOST_BLOCKS, TOKENS, Plan, blocks_shape, make_plan, max_tiles, sort_in_blocks
from .precision import precision_of
from .tiles import SMALLEST, Problem, Tiles, block_side, block_size, pinned, run_fitting


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
    blocks: Tensor | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """See `dynamic_dino_kernels.moe.expert_ffn`, which has checked the arguments.

    recompute: the backward pass computes the hidden layer again instead of keeping it.
    blocks: the router's, see plan.py.
    """
    tensors = [_contiguous(t) for t in (x, w1, b1, w2, b2, expert_ids, gates, blocks)]
    residual, weight, bias, eps = norm or (None, None, None, 0.0)
    tail = [_contiguous(t) for t in (residual, weight, bias)]
    save = needs_grad(*tensors, *tail)
    return expert_ffn_op(*tensors, *tail, eps, activation, save, save and not recompute)[0]


def find_ffn(x, w1, b1, w2, b2, expert_ids, gates, activation, blocks, norm) -> Call | None:
    """Of `expert_ffn`, if it can be repeated, see `replay`."""
    weight, bias, eps = norm or (None, None, 0.0)
    tensors = (x, w1, b1, w2, b2, expert_ids, gates, blocks, weight, bias)
    return _ffn.find(tensors, (eps, activation))


def find_block(x, rows, w1, b1, w2, b2, top_k, weighted, activation, norm) -> Call | None:
    """Of `moe_block`, if it can be repeated, see `replay`: y, ids, gates or None, and probs."""
    weight, bias, eps = norm or (None, None, 0.0)
    tensors = (x, rows, w1, b1, w2, b2, weight, bias)
    return _block.find(tensors, (top_k, weighted, eps, activation))


def _run_ffn(
    x, w1, b1, w2, b2, expert_ids, gates, blocks, norm_weight, norm_bias, eps, activation
) -> Tensor:
    residual = None if norm_weight is None else x
    arguments = (x, w1, b1, w2, b2, expert_ids, gates, blocks, residual, norm_weight, norm_bias)
    return forward(*arguments, eps, activation, False, False)[0]


def _run_block(
    x, rows, w1, b1, w2, b2, norm_weight, norm_bias, top_k, weighted, eps, activation
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    gates, probs, ids, blocks = router.forward(x, rows, top_k)
    weights = gates if weighted else None
    experts = (w1, b1, w2, b2, ids, weights, blocks)
    y = _run_ffn(x, *experts, norm_weight, norm_bias, eps, activation)
    return y, ids, weights, probs


def _state(x: Tensor) -> tuple:
    """What decides, besides shapes and types, which kernels run."""
    return precision_of(x) if x.dtype == torch.float32 else None, pinned()


_ffn, _block = Replayed(_run_ffn, _state), Replayed(_run_block, _state)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.contiguous()


# ---- operators ----------------------------------------------------------------------------------


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    expert_ids: Tensor,
    gates: Tensor | None,
    blocks: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    save: bool,
    save_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y [T, D], and what the backward pass needs: the plan's slots [N] and offsets [E + 1];
    the hidden layer before the activation, [N, H] or [N, 2H] by row; of the norm the input [T, D],
    and mean and 1 / deviation, [2, T]. What isn't saved is empty. All arguments are contiguous."""
    call = _Call(x, w1, expert_ids, activation)
    if blocks is None:
        blocks = sort_in_blocks(expert_ids, call.experts)
    elif blocks.shape != blocks_shape(len(x), call.top_k, call.experts):
        raise ValueError(
            f"blocks {list(blocks.shape)} were made for other ids than these of T={len(x)} tokens, "
            f"K={call.top_k} slots and E={call.experts} experts"
        )
    z = x.new_empty(call.n if save_hidden else 0, call.width)

    def run(tiles: Tiles) -> tuple[Plan, Tensor]:
        if tiles.form == "fused" and not save and len(blocks) <= MOST_BLOCKS:
            nothing = Plan(blocks.new_empty(0), blocks.new_empty(0))
            return nothing, _fused(call, tiles, blocks, x, w1, b1, w2, b2, z)
        plan = make_plan(blocks, call.n, call.experts)
        form = _fused if tiles.form == "fused" else _two_gemms
        return plan, form(call, tiles, plan, x, w1, b1, w2, b2, z)

    plan, rows = run_fitting(call.problem(), x.device, run)
    norm = None
    if residual is not None and norm_weight is not None and norm_bias is not None:
        norm = Norm(residual, norm_weight, norm_bias, eps)
    y, summed, stats = _combine(rows, expert_ids, gates, x, norm, save)
    slots, offsets = plan if save else (blocks.new_empty(0), blocks.new_empty(0))
    return y, slots, offsets, z, summed, stats


def backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    expert_ids: Tensor,
    gates: Tensor | None,
    slots: Tensor,
    offsets: Tensor,
    z: Tensor,
    activation: str,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, b1, w2, b2 and gates; without `weights`, the four are empty, and so are
    those of biases and gates that aren't there."""
    call, plan = _Call(x, w1, expert_ids, activation, backward=True), Plan(slots, offsets)
    saved = len(z) == call.n
    z = z if saved else x.new_empty(call.n, call.width)
    dz = torch.empty_like(z)
    gated = gates is not None

    def run(tiles: Tiles) -> tuple[Tensor, Tensor]:
        recompute = not saved
        if call.glu and recompute:  # within the next kernel, that would take too many registers
            _first_linear(call, tiles, plan, x, w1, b1, z, activated=False)
            recompute = False
        part, splits = call.split(tiles)
        dx_rows = x.new_empty(splits, call.n, call.dim, dtype=_row_dtype(x, splits))
        dgates = x.new_empty(splits, call.n if gated else 0, dtype=sum_dtype(x))
        launch(
            kernels.ffn_backward_rows,
            (max_tiles(call.n, call.experts, tiles.rows), splits),
            *(x, w1, _or(b1, x), w2, _or(b2, x), dy, gates if gated else dgates, *plan, z, dz),
            *(dx_rows, dgates, call.n, call.top_k, call.experts),
            **call.sizes, **call.numerics, **call.tile(tiles), **_biases(b1, b2),
            PART=part, GATED=gated, SAVED=not recompute,
        )  # fmt: skip
        return dx_rows, dgates

    dx_rows, dgates = run_fitting(call.problem(), x.device, run)
    dx = _combine(dx_rows, expert_ids, None, x)[0]
    # Empty slots have no row: what is at their place was never written.
    dgates = dgates.sum(0)
    if gates is not None:
        dgates = dgates.view_as(gates).masked_fill(expert_ids < 0, 0).to(gates.dtype)

    grads = _empty_grads(w1, b1, w2, b2, weights)
    if weights:
        block = min(block_side(x.dtype), max(block_size(call.dim), block_size(call.hidden)))
        launch(
            kernels.ffn_backward_weights,
            (call.experts, triton.cdiv(call.hidden, block), triton.cdiv(call.dim, block)),
            *(x, dy, gates if gated else dgates, *plan, z, dz, *grads, call.top_k),
            **call.sizes, **call.numerics, **_biases(b1, b2), GATED=gated,
            BLOCK_D=block, BLOCK_H=block,
            ROWS=max(SMALLEST, block // 2), num_warps=4, num_stages=2,
        )  # fmt: skip
    dw1, db1, dw2, db2 = grads
    return dx, dw1, db1, dw2, db2, dgates


expert_ffn_op = torch.library.custom_op("dynamic_dino::expert_ffn", forward, mutates_args=())
expert_ffn_backward_op = torch.library.custom_op(
    "dynamic_dino::expert_ffn_backward", backward, mutates_args=()
)


@expert_ffn_op.register_fake
def _(
    x, w1, b1, w2, b2, expert_ids, gates, blocks, residual, norm_weight, norm_bias, eps, activation,
    save, save_hidden,
):  # fmt: skip
    n = expert_ids.shape[0] * expert_ids.shape[1]
    slots, offsets = (
        expert_ids.new_empty(k if save else 0, dtype=torch.int32) for k in (n, w1.shape[0] + 1)
    )
    z = x.new_empty(n if save_hidden else 0, w1.shape[1])
    y = x.new_empty(x.shape, dtype=x.dtype if residual is None else norm_weight.dtype)
    kept = x.shape[0] if save and residual is not None else 0
    stats = x.new_empty(2, kept, dtype=sum_dtype(x))
    return y, slots, offsets, z, y.new_empty(kept, y.shape[1]), stats


@expert_ffn_backward_op.register_fake
def _(dy, x, w1, b1, w2, b2, expert_ids, gates, slots, offsets, z, activation, weights):
    grads = _empty_grads(w1, b1, w2, b2, weights)
    dgates = x.new_empty(0, dtype=sum_dtype(x)) if gates is None else torch.empty_like(gates)
    return x.new_empty(x.shape), *grads, dgates


def _empty_grads(w1, b1, w2, b2, weights: bool) -> list[Tensor]:
    shapes = [p.shape if weights and p is not None else 0 for p in (w1, b1, w2, b2)]
    return [w1.new_empty(shape) for shape in shapes]


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
        weight, bias, summed, stats = ctx.saved_tensors[10:]
        # As wide as the statistics, which PyTorch asks for on a CPU; the usual norm is anyway.
        dy, summed, wide, shift = (t.to(stats.dtype) for t in (dy, summed, weight, bias))
        mean, rstd = stats[:, :, None]
        dy, *of_norm = torch.ops.aten.native_layer_norm_backward(
            dy, summed, [dy.shape[1]], mean, rstd, wide, shift, [True] * 3
        )
        dnorm_weight, dnorm_bias = (t.to(weight.dtype) for t in of_norm)
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
        self.experts, self.width, self.dim = w1.shape
        self.glu = activation in GATED
        self.hidden = self.width // 2 if self.glu else self.width
        self.top_k, self.n = expert_ids.shape[1], expert_ids.numel()
        self.dtype, self.backward, precision = x.dtype, backward, precision_of(x, backward)
        self.sizes = dict(D=self.dim, H=self.hidden)
        self.dependent = gpu_of(x.device).dependent_launch
        self.numerics = dict(
            ACTIVATION=GATED.get(activation, activation), GLU=self.glu, SUM=sum_type(x),
            PRECISION=precision,
        )  # fmt: skip

    def problem(self) -> Problem:
        """Of a gated activation, that of twice the units: two rows of W1 make one."""
        sizes = (self.n, self.experts, self.dim, self.width)
        return Problem(*sizes, self.dtype, self.backward, self.top_k, self.numerics["PRECISION"])

    def block_h(self, tiles: Tiles) -> int:
        """Hidden units at a time."""
        return max(SMALLEST, tiles.hidden // 2) if self.glu else tiles.hidden

    def split(self, tiles: Tiles) -> tuple[int, int]:
        """Hidden units of each split, a multiple of the block, and how many splits that makes."""
        block = self.block_h(tiles)
        part = triton.cdiv(triton.cdiv(self.hidden, tiles.splits), block) * block
        return part, triton.cdiv(self.hidden, part)

    def tile(self, tiles: Tiles) -> dict:
        warps, stages = tiles.warps, tiles.stages
        if self.glu:  # more operands than the tiles are made for, which otherwise spill
            warps, stages = (min(4, warps), stages) if self.backward else (warps, max(2, stages))
        return dict(
            EXPERTS=block_size(self.experts, 2), BLOCK_D=block_size(self.dim), ROWS=tiles.rows,
            BLOCK_H=self.block_h(tiles), num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def grouped(self, tiles: Tiles) -> dict:
        stages = max(3, tiles.stages) if self.glu else tiles.stages  # as in `tile`
        return dict(
            EXPERTS=block_size(self.experts, 2), ROWS=tiles.rows, **self.numerics,
            **self.dependent, num_warps=tiles.warps, num_stages=stages,
        )  # fmt: skip


def _fused(call: _Call, tiles: Tiles, plan: Plan | Tensor, x, w1, b1, w2, b2, z: Tensor) -> Tensor:
    """[splits, N, D] by slot; fills z if it has room. Instead of the plan, the sorted blocks."""
    direct = isinstance(plan, Tensor)
    slots, offsets = (plan, plan) if direct else plan
    blocks = len(plan) if direct else 0
    part, splits = call.split(tiles)
    rows = x.new_empty(splits, call.n, call.dim, dtype=_row_dtype(x, splits))
    launch(
        kernels.fused_ffn,
        (max_tiles(call.n, call.experts, tiles.rows), splits),
        *(x, w1, _or(b1, x), w2, _or(b2, x), slots, offsets, rows, z if len(z) else rows),
        *(call.n, call.top_k, call.experts, blocks),
        **call.sizes, **call.numerics, **call.tile(tiles), **call.dependent, **_biases(b1, b2),
        PART=part, SAVE=len(z) > 0, BLOCKS=block_size(blocks, 2) if direct else 0,
        SPAN=TOKENS * call.top_k,
    )  # fmt: skip
    return rows


def _two_gemms(call: _Call, tiles: Tiles, plan: Plan, x, w1, b1, w2, b2, z: Tensor) -> Tensor:
    """[1, N, D] by slot; fills z if it has room, else keeps the hidden layer activated."""
    save = len(z) > 0
    z = z if save else x.new_empty(call.n, call.hidden)
    _first_linear(call, tiles, plan, x, w1, b1, z, activated=not save)
    rows = x.new_empty(1, call.n, call.dim)
    columns = min(_columns(call, x, joins=save), block_size(call.dim))
    launch(
        kernels.grouped_linear,
        (triton.cdiv(call.dim, columns), max_tiles(call.n, call.experts, tiles.rows)),
        *(z, w2, _or(b2, x), *plan, rows, call.top_k, call.experts),
        IN=call.hidden, OUT=call.dim, GATHER=False, BEFORE=save, AFTER=False, BIAS=b2 is not None,
        BLOCK_OUT=columns, BLOCK_IN=min(block_side(x.dtype), block_size(call.hidden)),
        **call.grouped(tiles),
    )  # fmt: skip
    return rows


def _first_linear(
    call: _Call, tiles: Tiles, plan: Plan, x, w1, b1, z: Tensor, activated: bool
) -> None:
    """Fills z with the hidden layer by row, [N, H] activated, or as it is before."""
    units = call.hidden if activated else call.width
    columns = min(_columns(call, x, joins=True), block_size(units))
    launch(
        kernels.grouped_linear,
        (triton.cdiv(units, columns), max_tiles(call.n, call.experts, tiles.rows)),
        *(x, w1, _or(b1, x), *plan, z, call.top_k, call.experts),
        IN=call.dim, OUT=units, GATHER=True, BEFORE=False, AFTER=activated, BIAS=b1 is not None,
        BLOCK_OUT=columns, BLOCK_IN=min(block_side(x.dtype), block_size(call.dim)),
        **call.grouped(tiles),
    )  # fmt: skip


def _columns(call: _Call, x: Tensor, joins: bool) -> int:
    """Of a block of a grouped linear layer; half where it joins the halves of a gated one."""
    return block_side(x.dtype) if call.glu and joins else 2 * block_side(x.dtype)


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
        *(residual, weight, bias, y, summed if kept else y, stats if kept else y, tokens, n),
        **gpu_of(x.device).dependent_launch,
        TOP_K=top_k, SPLITS=splits, D=dim, GATED=gates is not None, NORM=norm is not None,
        EPS=eps, SAVE=kept > 0, SUM=sum_type(x), BLOCK_D=block, TOKENS=4, num_warps=4,
    )  # fmt: skip
    return y, summed, stats


def _or(bias: Tensor | None, unused: Tensor) -> Tensor:
    """A kernel's argument where there is no bias; it isn't read."""
    return unused if bias is None else bias


def _biases(b1: Tensor | None, b2: Tensor | None) -> dict[str, bool]:
    return dict(BIAS1=b1 is not None, BIAS2=b2 is not None)


def _row_dtype(x: Tensor, splits: int) -> torch.dtype:
    """Parts of a sum are kept wide; a whole result is rounded as a linear layer's is."""
    return sum_dtype(x) if splits > 1 else x.dtype
