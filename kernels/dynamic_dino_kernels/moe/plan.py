"""The plan of a grouped matrix multiplication: which slots each expert works on.

A counting sort that never leaves the device, with grids that depend on shapes only, so that CUDA
graphs can capture it; stable (an expert's slots stay in token order), without atomics. First, each
block of TOKENS tokens sorts its own slots by expert, which the router's kernel does on the way.

- For some thousand tokens that is all: a program of the FFN finds the rows of its tile by looking
  through the blocks (`find_rows_in_blocks`).
- Else, and where a backward pass follows, `place_slots` merges the blocks to one order.

TransformerEngine's row-id map and vLLM's alignment step are built alike; the tile table they make
is left out, since each program of our kernels finds its tile from the experts' counts faster than
it could load it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import gpu_of, launch, wait_for_inputs

TOKENS = 32  # of a block
MOST_BLOCKS = 64  # that a program of the FFN looks through


class Plan(NamedTuple):
    """The N = T * K slots, ordered by expert, then by token.

    slots    int32 [N], index of each row's slot in the flattened [T, K]; -1 past the last expert's
    offsets  int32 [E + 1], expert e owns the rows offsets[e] to offsets[e + 1]
    """

    slots: Tensor
    offsets: Tensor


def blocks_shape(tokens: int, top_k: int, num_experts: int) -> tuple[int, int]:
    """Of the int32 tensor of sorted blocks: a row is a block. First, E + 1 numbers: where each
    expert's slots start in the block's list, and where the last one's end; then the list, indices
    of slots in the flattened [T, K], and -1 where it has come to its end."""
    return (tokens + TOKENS - 1) // TOKENS, num_experts + 1 + TOKENS * top_k


def sort_in_blocks(expert_ids: Tensor, num_experts: int) -> Tensor:
    """expert_ids: int32 or int64 [T, K], contiguous, -1 for an empty slot -> `blocks_shape`."""
    tokens, top_k = expert_ids.shape
    shape = blocks_shape(tokens, top_k, num_experts)
    if expert_ids.numel() == 0:
        return expert_ids.new_zeros(shape, dtype=torch.int32)
    blocks = expert_ids.new_empty(shape, dtype=torch.int32)
    launch(
        sort_blocks, blocks.shape[:1], expert_ids, blocks, expert_ids.numel(), num_experts,
        SPAN=TOKENS * top_k, BLOCK=triton.next_power_of_2(TOKENS * top_k),
        BINS=triton.next_power_of_2(num_experts + 1),
    )  # fmt: skip
    return blocks


def make_plan(blocks: Tensor, n: int, num_experts: int) -> Plan:
    """blocks: what `sort_in_blocks` or a router's kernel made of the N = T * K slots."""
    slots = blocks.new_empty(n)
    if n == 0:
        return Plan(slots, blocks.new_zeros(num_experts + 1))
    offsets = blocks.new_empty(num_experts + 1)
    span = blocks.shape[1] - num_experts - 1
    launch(
        place_slots, blocks.shape[:1], blocks, slots, offsets, n, num_experts, len(blocks),
        SPAN=span, BLOCK=triton.next_power_of_2(span),
        BINS=triton.next_power_of_2(num_experts + 1), STEP=64,
        **gpu_of(blocks.device).dependent_launch,
    )  # fmt: skip
    return Plan(slots, offsets)


@triton.jit
def sort_blocks(
    expert_ids,
    blocks,
    n,
    num_experts,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Sorts the slots of a block by expert; of the same expert, the first slot comes first."""
    block = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    slot = block * SPAN + index
    live = (index < SPAN) & (slot < n)
    expert = tl.load(expert_ids + slot, mask=live, other=-1).to(tl.int32)
    bins = tl.arange(0, BINS)
    hits = (expert[:, None] == bins[None, :]) & (bins < num_experts)[None, :] & live[:, None]
    hits = hits.to(tl.int32)
    counts = tl.sum(hits, 0)
    start = tl.cumsum(counts, 0) - counts
    row = blocks + block.to(tl.int64) * (num_experts + 1 + SPAN)
    tl.store(row + bins, start, mask=bins <= num_experts)
    place = tl.sum((tl.cumsum(hits, 0) - 1 + start[None, :]) * hits, 1)
    tl.store(row + num_experts + 1 + place, slot, mask=tl.sum(hits, 1) > 0)
    rest = (index >= tl.sum(counts, 0)) & (index < SPAN)
    tl.store(row + num_experts + 1 + index, -1, mask=rest)


@triton.jit
def place_slots(
    blocks,
    slots,
    offsets,
    n,
    num_experts,
    num_blocks,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Writes the slots of a block to their rows; the first block writes the offsets as well."""
    wait_for_inputs(PDL)
    block = tl.program_id(0)
    bins = tl.arange(0, BINS)
    real = bins < num_experts
    width = num_experts + 1 + SPAN
    before = tl.zeros([BINS], tl.int32)
    total = tl.zeros([BINS], tl.int32)
    for start in range(0, num_blocks, STEP):
        other = start + tl.arange(0, STEP)
        at = other.to(tl.int64)[:, None] * width + bins[None, :]
        mask = (other < num_blocks)[:, None] & real[None, :]
        count = tl.load(blocks + at + 1, mask=mask, other=0) - tl.load(
            blocks + at, mask=mask, other=0
        )
        total += tl.sum(count, 0)
        before += tl.sum(tl.where((other < block)[:, None], count, 0), 0)
    first = tl.cumsum(total, 0) - total
    if block == 0:
        tl.store(offsets + bins, first, mask=bins <= num_experts)

    row = blocks + block.to(tl.int64) * width
    start = tl.load(row + bins, mask=real, other=0)
    end = tl.load(row + bins + 1, mask=real, other=0)
    index = tl.arange(0, BLOCK)
    mine = (index[:, None] >= start[None, :]) & (index[:, None] < end[None, :])
    shift = tl.sum(tl.where(mine, (first + before - start)[None, :], 0), 1)
    filled = index < tl.max(end, 0)
    slot = tl.load(row + num_experts + 1 + index, mask=filled, other=0)
    tl.store(slots + index + shift, slot, mask=filled)
    # Rows that nobody owns, as many as the slots that stayed empty.
    empty = tl.sum(total, 0) + block * SPAN - tl.sum(before, 0) - tl.max(end, 0) + index
    live = (index >= tl.max(end, 0)) & (index < SPAN) & (block * SPAN + index < n)
    tl.store(slots + empty, -1, mask=live)


@triton.jit
def find_tile(offsets, tile, num_experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Expert, first row and end of the expert's rows of tile number `tile`.

    Every expert's rows are cut into tiles of ROWS; tiles are counted through all experts. Past the
    last tile, the first row is not before the end. A grid of ceil(N / ROWS) + min(E, N) programs
    has a place for every tile whatever the routing.
    """
    index = tl.arange(0, EXPERTS)
    real = index < num_experts
    start = tl.load(offsets + index, mask=real, other=0)
    end = tl.load(offsets + index + 1, mask=real, other=0)
    expert, first, _ = _tile_of(end - start, tile, index, ROWS)
    mine = index == expert
    return (
        expert,
        first + tl.sum(tl.where(mine, start, 0), 0),
        tl.sum(tl.where(mine, end, 0), 0),
    )


@triton.jit
def _tile_of(counts, tile, index, ROWS: tl.constexpr):
    """Expert of a tile, its first among the expert's rows, and how many those are."""
    tiles = (counts + ROWS - 1) // ROWS
    last = tl.cumsum(tiles, 0)
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    mine = index == expert
    first = tl.sum(tl.where(mine, (tile - last + tiles) * ROWS, 0), 0)
    return expert, first, tl.sum(tl.where(mine, counts, 0), 0)


@triton.jit
def find_rows_in_blocks(
    blocks,
    tile,
    num_experts,
    num_blocks,
    SPAN: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Expert of tile number `tile`, which of its ROWS rows exist, and their slots: as `find_tile`,
    but from the sorted blocks, of which there are at most BLOCKS. Past the last tile, no row is."""
    block, index = tl.arange(0, BLOCKS), tl.arange(0, EXPERTS)
    width = num_experts + 1 + SPAN
    at = block[:, None] * width + index[None, :]
    mask = (block < num_blocks)[:, None] & (index < num_experts)[None, :]
    start = tl.load(blocks + at, mask=mask, other=0)
    count = tl.load(blocks + at + 1, mask=mask, other=0) - start
    expert, first, number = _tile_of(tl.sum(count, 0), tile, index, ROWS)

    mine = (index == expert)[None, :]
    count = tl.sum(tl.where(mine, count, 0), 1)  # of the expert's slots in each block
    end = tl.cumsum(count, 0)
    # Of a row in a block: its place among all lists is its number among the expert's rows, plus
    shift = block * width + tl.sum(tl.where(mine, start, 0), 1) - (end - count) + num_experts + 1
    row = first + tl.arange(0, ROWS)
    live = row < number
    owner = tl.sum((end[None, :] <= row[:, None]).to(tl.int32), 1)
    place = row + tl.sum(tl.where(block[None, :] == owner[:, None], shift[None, :], 0), 1)
    return expert, live, tl.load(blocks + place, mask=live, other=0)


def max_tiles(n: int, num_experts: int, rows: int) -> int:
    """Upper bound of the number of tiles, from shapes alone."""
    return triton.cdiv(n, rows) + min(num_experts, n)
