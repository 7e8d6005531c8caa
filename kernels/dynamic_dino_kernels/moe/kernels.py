"""Triton kernels of the expert FFN. `ops.py` launches them, `plan.py` orders their rows.

N = T * K slots; a row is a slot's place in the plan, so an expert's rows are neighbours. D is the
width, H the hidden size of one expert. All tensors are contiguous. Sums are kept in `SUM`: float32,
or float64 for float64. With GLU, the hidden layer before the activation is 2H wide, as is W1: the
activated first half, the gate of SwiGLU and GeGLU, is multiplied by the second, `up`. A bias that
isn't there is not read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import let_next_start, wait_for_inputs
from .plan import find_rows_in_blocks, find_tile


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(z < 0, 0.0, z)  # NaN stays NaN, which tl.maximum would not promise
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 is the sigmoid of 2u
        return z / (1 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    else:
        return z / (1 + tl.exp(-z))


@triton.jit
def _activation_gradient(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACTIVATION == "gelu_tanh":
        sigmoid = 1 / (1 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
        slope = 1.5957691216057308 * (1 + 0.134145 * z * z)
        return sigmoid * (1 + z * (1 - sigmoid) * slope)
    else:
        sigmoid = 1 / (1 + tl.exp(-z))
        return sigmoid * (1 + z * (1 - sigmoid))


@triton.jit
def _load_rows(slots, first, end, ROWS: tl.constexpr):
    """ROWS rows from `first` on, which of them exist, and their slots."""
    row = first + tl.arange(0, ROWS)
    live = row < end
    slot = tl.load(slots + row, mask=live, other=0).to(tl.int64)
    return row.to(tl.int64), live, slot


@triton.jit
def _hidden_layer(
    x_tile,
    w1,
    b1,
    h,
    d,
    H: tl.constexpr,
    D: tl.constexpr,
    BIAS: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x W1^T + b1 at the hidden units h, for the expert whose weights w1 and b1 point to."""
    in_h = h < H
    w1_t = tl.load(
        w1 + h[None, :] * D + d[:, None], mask=in_h[None, :] & (d < D)[:, None], other=0.0
    )
    z = tl.dot(x_tile, w1_t, input_precision=PRECISION, out_dtype=SUM)
    if BIAS:
        z += tl.load(b1 + h, mask=in_h, other=0.0).to(SUM)[None, :]
    return z


@triton.jit
def fused_ffn(
    x,
    w1,
    b1,
    w2,
    b2,
    slots,  # and offsets: the plan; or the sorted blocks twice, if BLOCKS
    offsets,
    out,  # [SPLITS, N, D], by slot
    hidden,  # [N, H] or [N, 2H] before the activation, by row; written if SAVE
    n,
    top_k,
    num_experts,
    num_blocks,
    D: tl.constexpr,
    H: tl.constexpr,
    PART: tl.constexpr,  # hidden units per split, a multiple of BLOCK_H
    BLOCKS: tl.constexpr,  # at most so many blocks; 0: the plan is given
    SPAN: tl.constexpr,  # slots of a block
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    BIAS1: tl.constexpr,
    BIAS2: tl.constexpr,
    SAVE: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[slot] = act(x[token] W1^T + b1) W2^T + b2 for a tile of rows of one expert.

    The hidden layer passes through registers, BLOCK_H units at a time. When tiles are too few to
    fill the GPU, the hidden units are split among programs that each write a part of the sum.
    """
    wait_for_inputs(PDL)
    tile = tl.program_id(0)
    if BLOCKS > 0:
        expert, live, slot = find_rows_in_blocks(
            blocks=slots, tile=tile, num_experts=num_experts, num_blocks=num_blocks,
            SPAN=SPAN, EXPERTS=EXPERTS, ROWS=ROWS, BLOCKS=BLOCKS,
        )  # fmt: skip
        if expert >= num_experts:
            return
        row = slot
    else:
        expert, first, end = find_tile(offsets, tile, num_experts, EXPERTS, ROWS)
        if first >= end:
            return
        row, live, slot = _load_rows(slots, first, end, ROWS)
        slot = slot.to(tl.int32)  # kept through the loop: half the registers
    split = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    x_tile = tl.load(
        x + ((slot // top_k).to(tl.int64) * D)[:, None] + d[None, :],
        mask=live[:, None] & in_d[None, :],
        other=0.0,
    )
    expert = expert.to(tl.int64)
    WIDTH: tl.constexpr = 2 * H if GLU else H
    w1 += expert * WIDTH * D
    b1 += expert * WIDTH
    w2 += expert * D * H
    acc = tl.zeros([ROWS, BLOCK_D], SUM)
    for start in range(0, PART, BLOCK_H):
        h = split * PART + start + tl.arange(0, BLOCK_H)
        in_h = h < H
        z = _hidden_layer(x_tile, w1, b1, h, d, H, D, BIAS1, SUM, PRECISION)
        a = _activate(z, ACTIVATION)
        at_h = row.to(tl.int64)[:, None] * WIDTH + h[None, :]
        mask_h = live[:, None] & in_h[None, :]
        if SAVE:
            tl.store(hidden + at_h, z, mask=mask_h)
        if GLU:
            up = _hidden_layer(x_tile, w1 + H * D, b1 + H, h, d, H, D, BIAS1, SUM, PRECISION)
            a *= up
            if SAVE:
                tl.store(hidden + at_h + H, up, mask=mask_h)
        w2_t = tl.load(
            w2 + d[None, :] * H + h[:, None], mask=in_h[:, None] & in_d[None, :], other=0.0
        )
        acc = tl.dot(a.to(w2_t.dtype), w2_t, acc, input_precision=PRECISION, out_dtype=SUM)
    let_next_start(PDL)
    if BIAS2 and split == 0:
        acc += tl.load(b2 + expert * D + d, mask=in_d, other=0.0).to(SUM)[None, :]
    tl.store(
        out + (split.to(tl.int64) * n + slot)[:, None] * D + d[None, :],
        acc,
        mask=live[:, None] & in_d[None, :],
    )


@triton.jit
def grouped_linear(
    x,
    w,  # [E, OUT, IN], and if GLU, [E, 2 OUT, IN]
    bias,  # [E, OUT] or [E, 2 OUT]
    slots,
    offsets,
    out,
    top_k,
    num_experts,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    GATHER: tl.constexpr,  # True: rows come from tokens and stay rows; False: from rows to slots
    ACTIVATION: tl.constexpr,
    BEFORE: tl.constexpr,  # activates the input, on load; if GLU, 2 IN wide
    AFTER: tl.constexpr,  # activates the output
    GLU: tl.constexpr,
    BIAS: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One linear layer of all experts: the FFN in two launches, for widths that don't fit one."""
    wait_for_inputs(PDL)
    expert, first, end = find_tile(offsets, tl.program_id(1), num_experts, EXPERTS, ROWS)
    if first >= end:
        return
    row, live, slot = _load_rows(slots, first, end, ROWS)
    if GATHER:
        source, target = slot // top_k, row
    else:
        source, target = row, slot
    o = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_o = o < OUT
    HALVES_IN: tl.constexpr = 2 if GLU and BEFORE else 1
    HALVES_OUT: tl.constexpr = 2 if GLU and AFTER else 1
    w += expert.to(tl.int64) * HALVES_OUT * OUT * IN
    bias += expert.to(tl.int64) * HALVES_OUT * OUT
    acc = tl.zeros([ROWS, BLOCK_OUT], SUM)
    if HALVES_OUT == 2:
        up = tl.zeros([ROWS, BLOCK_OUT], SUM)
    for start in range(0, IN, BLOCK_IN):
        i = start + tl.arange(0, BLOCK_IN)
        in_i = i < IN
        at_x = x + (source.to(tl.int64) * HALVES_IN * IN)[:, None] + i[None, :]
        mask_x = live[:, None] & in_i[None, :]
        x_tile = tl.load(at_x, mask=mask_x, other=0.0)
        at_w = w + o[None, :] * IN + i[:, None]
        mask_w = in_o[None, :] & in_i[:, None]
        w_t = tl.load(at_w, mask=mask_w, other=0.0)
        if BEFORE:
            a = _activate(x_tile.to(SUM), ACTIVATION)
            if HALVES_IN == 2:
                a *= tl.load(at_x + IN, mask=mask_x, other=0.0).to(SUM)
            x_tile = a.to(w_t.dtype)
        acc = tl.dot(x_tile, w_t, acc, input_precision=PRECISION, out_dtype=SUM)
        if HALVES_OUT == 2:
            up_t = tl.load(at_w + OUT * IN, mask=mask_w, other=0.0)
            up = tl.dot(x_tile, up_t, up, input_precision=PRECISION, out_dtype=SUM)
    let_next_start(PDL)
    if BIAS:
        acc += tl.load(bias + o, mask=in_o, other=0.0).to(SUM)[None, :]
    if AFTER:
        acc = _activate(acc, ACTIVATION)
    if HALVES_OUT == 2:
        if BIAS:
            up += tl.load(bias + OUT + o, mask=in_o, other=0.0).to(SUM)[None, :]
        acc *= up
    tl.store(
        out + target.to(tl.int64)[:, None] * OUT + o[None, :],
        acc,
        mask=live[:, None] & in_o[None, :],
    )


@triton.jit
def combine_slots(
    rows,  # [SPLITS, N, D], by slot
    expert_ids,
    gates,
    residual,  # [T, D], and weight and bias [D] of the norm; read if NORM
    norm_weight,
    norm_bias,
    y,  # [T, D]
    summed,  # [T, D] the norm's input, and mean and 1 / deviation, [2, T]; written if SAVE
    stats,
    tokens,
    n,
    TOP_K: tl.constexpr,
    SPLITS: tl.constexpr,
    D: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    SAVE: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[t] = sum over the filled slots k of gates[t, k] * rows[t, k]; a gather, no atomics.

    With NORM, y[t] = LayerNorm(residual[t] + that), in the same pass. Without gates, they are 1.
    """
    wait_for_inputs(PDL)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = token < tokens
    in_d = d < D
    block = live[:, None] & in_d[None, :]
    at = token[:, None] * D + d[None, :]
    acc = tl.zeros([TOKENS, BLOCK_D], SUM)
    for k in range(TOP_K):
        slot = token * TOP_K + k
        filled = live & (tl.load(expert_ids + slot, mask=live, other=-1) >= 0)
        mask = filled[:, None] & in_d[None, :]
        part = tl.zeros([TOKENS, BLOCK_D], SUM)
        for split in range(SPLITS):
            part += tl.load(
                rows + (split * n + slot)[:, None] * D + d[None, :], mask=mask, other=0.0
            ).to(SUM)
        if GATED:
            part *= tl.load(gates + slot, mask=filled, other=0.0).to(SUM)[:, None]
        acc += part
    if NORM:
        acc += tl.load(residual + at, mask=block, other=0.0).to(SUM)
        mean = tl.sum(acc, 1) / D
        centred = tl.where(in_d[None, :], acc - mean[:, None], 0.0)
        rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / D + EPS)
        if SAVE:
            tl.store(summed + at, acc, mask=block)
            tl.store(stats + token, mean, mask=live)
            tl.store(stats + tokens + token, rstd, mask=live)
        weight = tl.load(norm_weight + d, mask=in_d, other=0.0).to(SUM)
        bias = tl.load(norm_bias + d, mask=in_d, other=0.0).to(SUM)
        acc = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y + at, acc, mask=block)


@triton.jit
def ffn_backward_rows(
    x,
    w1,
    b1,
    w2,
    b2,
    dy,
    gates,
    slots,
    offsets,
    hidden,  # [N, H] or [N, 2H] before the activation, by row; read if SAVED, as with GLU it must
    # be, else written
    dz,  # its gradient, by row
    dx_rows,  # [SPLITS, N, D], by slot
    dgates,  # [SPLITS, N], by slot
    n,
    top_k,
    num_experts,
    D: tl.constexpr,
    H: tl.constexpr,
    PART: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    BIAS1: tl.constexpr,
    BIAS2: tl.constexpr,
    GATED: tl.constexpr,
    SAVED: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Gradients at the rows of one tile: hidden layer, tokens, gates.

    With r = dy W2, the gradient of the gate is r . act(z) + dy . b2, and that of z is
    gate * r * act'(z): the forward output is never needed (SonicMoE, arXiv 2512.14080). Without
    gates, they are 1 and have no gradient.
    """
    expert, first, end = find_tile(offsets, tl.program_id(0), num_experts, EXPERTS, ROWS)
    if first >= end:
        return
    split = tl.program_id(1)
    row, live, slot = _load_rows(slots, first, end, ROWS)
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    mask_d = live[:, None] & in_d[None, :]
    dy_tile = tl.load(
        dy + ((slot // top_k).to(tl.int64) * D)[:, None] + d[None, :], mask=mask_d, other=0.0
    )
    if GATED:
        gate = tl.load(gates + slot, mask=live, other=0.0).to(SUM)
        dgate = tl.zeros([ROWS], SUM)
    if not SAVED:
        x_tile = tl.load(
            x + ((slot // top_k).to(tl.int64) * D)[:, None] + d[None, :], mask=mask_d, other=0.0
        )
    expert = expert.to(tl.int64)
    WIDTH: tl.constexpr = 2 * H if GLU else H
    w1 += expert * WIDTH * D
    b1 += expert * WIDTH
    w2 += expert * D * H
    dx = tl.zeros([ROWS, BLOCK_D], SUM)
    for start in range(0, PART, BLOCK_H):
        h = split * PART + start + tl.arange(0, BLOCK_H)
        in_h = h < H
        mask_h = live[:, None] & in_h[None, :]
        at_h = row.to(tl.int64)[:, None] * WIDTH + h[None, :]
        if SAVED:
            z = tl.load(hidden + at_h, mask=mask_h, other=0.0).to(SUM)
        else:
            z = _hidden_layer(x_tile, w1, b1, h, d, H, D, BIAS1, SUM, PRECISION)
            tl.store(hidden + at_h, z, mask=mask_h)
        w2_h = tl.load(
            w2 + d[:, None] * H + h[None, :], mask=in_d[:, None] & in_h[None, :], other=0.0
        )
        r = tl.dot(dy_tile, w2_h, input_precision=PRECISION, out_dtype=SUM)
        dz_tile = r * _activation_gradient(z, ACTIVATION)
        if GATED or GLU:
            ra = r * _activate(z, ACTIVATION)
        if GLU:
            up = tl.load(hidden + at_h + H, mask=mask_h, other=0.0).to(SUM)
            dz_tile *= up
        if GATED:
            dgate += tl.sum(ra * up if GLU else ra, 1)
            dz_tile *= gate[:, None]
        at_w1 = w1 + h[:, None] * D + d[None, :]
        mask_w1 = in_h[:, None] & in_d[None, :]
        tl.store(dz + at_h, dz_tile, mask=mask_h)
        w1_h = tl.load(at_w1, mask=mask_w1, other=0.0)
        dx = tl.dot(dz_tile.to(w1_h.dtype), w1_h, dx, input_precision=PRECISION, out_dtype=SUM)
        if GLU:
            dup = ra * gate[:, None] if GATED else ra
            tl.store(dz + at_h + H, dup, mask=mask_h)
            w1_h = tl.load(at_w1 + H * D, mask=mask_w1, other=0.0)
            dx = tl.dot(dup.to(w1_h.dtype), w1_h, dx, input_precision=PRECISION, out_dtype=SUM)
    if GATED:
        if BIAS2 and split == 0:
            bias = tl.load(b2 + expert * D + d, mask=in_d, other=0.0).to(SUM)
            dgate += tl.sum(dy_tile.to(SUM) * bias[None, :], 1)
        tl.store(dgates + split * n + slot, dgate, mask=live)
    tl.store(dx_rows + (split.to(tl.int64) * n + slot)[:, None] * D + d[None, :], dx, mask=mask_d)


@triton.jit
def ffn_backward_weights(
    x,
    dy,
    gates,
    slots,
    offsets,
    hidden,
    dz,
    dw1,
    db1,
    dw2,
    db2,
    top_k,
    D: tl.constexpr,
    H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    BIAS1: tl.constexpr,
    BIAS2: tl.constexpr,
    GATED: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dW1 = dz^T x, dW2 = (gate dy)^T act(z) and the biases' gradients: a block of one expert.

    A program owns its block of all four, so nothing is added atomically, and an expert without
    rows gets its zeros.
    """
    expert = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_h, in_d = h < H, d < D
    first = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    dw1_acc = tl.zeros([BLOCK_H, BLOCK_D], SUM)
    dw2_acc = tl.zeros([BLOCK_D, BLOCK_H], SUM)
    db1_acc = tl.zeros([BLOCK_H], SUM)
    db2_acc = tl.zeros([BLOCK_D], SUM)
    WIDTH: tl.constexpr = 2 * H if GLU else H
    if GLU:
        dup_acc = tl.zeros([BLOCK_H, BLOCK_D], SUM)
        dup_bias = tl.zeros([BLOCK_H], SUM)
    for start in range(first, end, ROWS):
        row, live, slot = _load_rows(slots, start, end, ROWS)
        token = (slot // top_k).to(tl.int64)
        at_t = row.to(tl.int64)[None, :] * WIDTH + h[:, None]
        mask_t = live[None, :] & in_h[:, None]
        dz_t = tl.load(dz + at_t, mask=mask_t, other=0.0)
        mask_d = live[:, None] & in_d[None, :]
        x_tile = tl.load(x + (token * D)[:, None] + d[None, :], mask=mask_d, other=0.0)
        dw1_acc = tl.dot(dz_t, x_tile, dw1_acc, input_precision=PRECISION, out_dtype=SUM)
        if BIAS1:
            db1_acc += tl.sum(dz_t.to(SUM), 1)
        if GLU:
            dup_t = tl.load(dz + at_t + H, mask=mask_t, other=0.0)
            dup_acc = tl.dot(dup_t, x_tile, dup_acc, input_precision=PRECISION, out_dtype=SUM)
            if BIAS1:
                dup_bias += tl.sum(dup_t.to(SUM), 1)

        at_h = row.to(tl.int64)[:, None] * WIDTH + h[None, :]
        mask_h = live[:, None] & in_h[None, :]
        z = tl.load(hidden + at_h, mask=mask_h, other=0.0)
        a = _activate(z.to(SUM), ACTIVATION)
        if GLU:
            a *= tl.load(hidden + at_h + H, mask=mask_h, other=0.0).to(SUM)
        dy_t = tl.load(
            dy + (token * D)[None, :] + d[:, None],
            mask=live[None, :] & in_d[:, None],
            other=0.0,
        )
        dy_t = dy_t.to(SUM)
        if GATED:
            dy_t *= tl.load(gates + slot, mask=live, other=0.0).to(SUM)[None, :]
        a, dy_low = a.to(x_tile.dtype), dy_t.to(x_tile.dtype)
        dw2_acc = tl.dot(dy_low, a, dw2_acc, input_precision=PRECISION, out_dtype=SUM)
        if BIAS2:
            db2_acc += tl.sum(dy_t, 1)
    block = in_h[:, None] & in_d[None, :]
    at_w1 = dw1 + expert * WIDTH * D + h[:, None] * D + d[None, :]
    tl.store(at_w1, dw1_acc, mask=block)
    if GLU:
        tl.store(at_w1 + H * D, dup_acc, mask=block)
    block = in_d[:, None] & in_h[None, :]
    tl.store(dw2 + expert * D * H + d[:, None] * H + h[None, :], dw2_acc, mask=block)
    if BIAS1 and tl.program_id(2) == 0:
        tl.store(db1 + expert * WIDTH + h, db1_acc, mask=in_h)
        if GLU:
            tl.store(db1 + expert * WIDTH + H + h, dup_bias, mask=in_h)
    if BIAS2 and tl.program_id(1) == 0:
        tl.store(db2 + expert * D + d, db2_acc, mask=in_d)
