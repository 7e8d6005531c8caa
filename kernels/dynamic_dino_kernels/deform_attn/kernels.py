"""Triton kernels of multi-scale deformable attention.

One program takes a block of queries of one head of one image; its channels lie side by side, so the
four corners of a sample are four rows of the value tensor. `maps` holds height, width and first
cell of every level. All tensors are contiguous; locations, weights and sums are float32 or wider.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _map(maps, level):
    """Height, width and first cell of a level."""
    return tl.load(maps + level * 3), tl.load(maps + level * 3 + 1), tl.load(maps + level * 3 + 2)


@triton.jit
def _corner(left, top, fx, fy, height, width, first, CORNER: tl.constexpr):
    """Cell of the flattened maps, whether it lies on its map, and its share along x and y."""
    x, y = left + CORNER % 2, top + CORNER // 2
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    cell = first + tl.where(inside, y * width + x, 0)
    share_x = fx if CORNER % 2 == 1 else 1 - fx
    share_y = fy if CORNER >= 2 else 1 - fy
    return cell.to(tl.int64), inside, share_x, share_y


@triton.jit
def _sample(locations, at, live, height, width, SUM: tl.constexpr):
    """Top-left corner of the sampling points and their offsets from it, in cells."""
    x = tl.load(locations + at * 2, mask=live, other=0.0).to(SUM) * width - 0.5
    y = tl.load(locations + at * 2 + 1, mask=live, other=0.0).to(SUM) * height - 0.5
    # Far outside there is nothing to see, and integers end: NaN goes there as well.
    x = tl.where((x > -2) & (x < width + 1), x, -2.0)
    y = tl.where((y > -2) & (y < height + 1), y, -2.0)
    left, top = tl.floor(x), tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top


@triton.jit
def sample_forward(
    value,  # [B, S, HEADS, C]
    maps,  # int32 [LEVELS, 3]
    locations,  # [B, Q, HEADS, LEVELS, POINTS, 2]
    weights,  # [B, Q, HEADS, LEVELS, POINTS]
    out,  # [B, Q, HEADS, C]
    cells,
    queries,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    QUERIES: tl.constexpr,
):
    image = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    live = query < queries
    c = tl.arange(0, BLOCK_C)
    in_c = c < C
    row = (image * queries + query) * HEADS + head
    value += image * cells * HEADS * C + head * C
    acc = tl.zeros([QUERIES, BLOCK_C], SUM)
    for level in tl.static_range(LEVELS):
        height, width, first = _map(maps, level)
        for point in tl.static_range(POINTS):  # so that the points' loads don't wait for each other
            at = (row * LEVELS + level) * POINTS + point
            left, top, fx, fy = _sample(locations, at, live, height, width, SUM)
            weight = tl.load(weights + at, mask=live, other=0.0).to(SUM)
            for corner in tl.static_range(4):
                cell, inside, share_x, share_y = _corner(
                    left, top, fx, fy, height, width, first, corner
                )
                seen = tl.load(
                    value + cell[:, None] * (HEADS * C) + c[None, :],
                    mask=(live & inside)[:, None] & in_c[None, :],
                    other=0.0,
                ).to(SUM)
                acc += (weight * share_y * share_x)[:, None] * seen
    tl.store(out + row[:, None] * C + c[None, :], acc, mask=live[:, None] & in_c[None, :])


@triton.jit
def sample_backward(
    value,
    maps,
    locations,
    weights,
    dout,
    dvalue,  # zeros, float32 or wider; added to atomically
    dlocations,
    dweights,
    cells,
    queries,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    QUERIES: tl.constexpr,
):
    image = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    live = query < queries
    c = tl.arange(0, BLOCK_C)
    in_c = c < C
    row = (image * queries + query) * HEADS + head
    value += image * cells * HEADS * C + head * C
    dvalue += image * cells * HEADS * C + head * C
    grad = tl.load(
        dout + row[:, None] * C + c[None, :], mask=live[:, None] & in_c[None, :], other=0.0
    ).to(SUM)
    for level in tl.static_range(LEVELS):
        height, width, first = _map(maps, level)
        for point in range(POINTS):
            at = (row * LEVELS + level) * POINTS + point
            left, top, fx, fy = _sample(locations, at, live, height, width, SUM)
            weight = tl.load(weights + at, mask=live, other=0.0).to(SUM)
            dweight = tl.zeros([QUERIES], SUM)
            dx = tl.zeros([QUERIES], SUM)
            dy = tl.zeros([QUERIES], SUM)
            for corner in tl.static_range(4):
                cell, inside, share_x, share_y = _corner(
                    left, top, fx, fy, height, width, first, corner
                )
                mask = (live & inside)[:, None] & in_c[None, :]
                offset = cell[:, None] * (HEADS * C) + c[None, :]
                seen = tl.load(value + offset, mask=mask, other=0.0).to(SUM)
                match = tl.sum(grad * seen, 1)
                dweight += share_y * share_x * match
                dx += (share_y if corner % 2 == 1 else -share_y) * match
                dy += (share_x if corner >= 2 else -share_x) * match
                share = (weight * share_y * share_x)[:, None]
                tl.atomic_add(dvalue + offset, share * grad, mask=mask, sem="relaxed")
            tl.store(dweights + at, dweight, mask=live)
            tl.store(dlocations + at * 2, dx * weight * width, mask=live)
            tl.store(dlocations + at * 2 + 1, dy * weight * height, mask=live)
