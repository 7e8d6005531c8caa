"""The plan of a grouped matrix multiplication: which slots each expert works on.

A counting sort in two passes that never leaves the device: blocks of tokens count their experts,
which the router's kernel does on the way; then every block adds up the counts before it and writes
its slots to their places. Stable (an expert's slots stay in token order), without atomics, without
a sort, and with grids that depend on shapes only, so that CUDA graphs can capture it.
TransformerEngine's row-id map and vLLM's alignment step are built alike; the tile table they make
is left out, since each program of our kernels finds its tile from the expert's offsets
(`find_tile`) faster than it could load it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch

TOKENS = 32  # whose slots one program counts and places; the router counts the same blocks


class Plan(NamedTuple):
    """The N = T * K slots, ordered by expert, then by token; empty slots are last.

    slots    int32 [N], index of each row's slot in the flattened [T, K]
    offsets  int32 [E + 1], expert e owns the rows offsets[e] to offsets[e + 1]
    """

    slots: Tensor
    offsets: Tensor


def make_plan(expert_ids: Tensor, num_experts: int, counts: Tensor | None = None) -> Plan:
    """expert_ids: int32 or int64 [T, K], contiguous, -1 for an empty slot. counts: what the router
    counted already, int32 [ceil(T / TOKENS), E + 1]: slots of each expert, and the empty ones."""
    (tokens, top_k), n = expert_ids.shape, expert_ids.numel()
    slots = expert_ids.new_empty(n, dtype=torch.int32)
    if n == 0:
        return Plan(slots, expert_ids.new_zeros(num_experts + 1, dtype=torch.int32))
    offsets = expert_ids.new_empty(num_experts + 1, dtype=torch.int32)
    blocks = triton.cdiv(tokens, TOKENS)
    sizes = dict(
        SPAN=TOKENS * top_k, BLOCK=triton.next_power_of_2(TOKENS * top_k),
        BINS=triton.next_power_of_2(num_experts + 1),
    )  # fmt: skip
    if counts is None:
        counts = expert_ids.new_empty(blocks, num_experts + 1, dtype=torch.int32)
        launch(count_experts, (blocks,), expert_ids, counts, n, num_experts, **sizes)
    launch(
        place_slots, (blocks,), expert_ids, counts, slots, offsets, n, num_experts, blocks,
        **sizes, STEP=64,
    )  # fmt: skip
    return Plan(slots, offsets)


@triton.jit
def _one_hot(
    expert_ids, n, num_experts, SPAN: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr
):
    """[BLOCK, BINS], int32: the experts of this program's slots; empty slots count as one more."""
    index = tl.arange(0, BLOCK)
    slot = tl.program_id(0) * SPAN + index
    live = (index < SPAN) & (slot < n)
    expert = tl.load(expert_ids + slot, mask=live, other=-1).to(tl.int32)
    bin = tl.where(expert < 0, num_experts, expert)
    hits = (bin[:, None] == tl.arange(0, BINS)[None, :]) & live[:, None]
    return slot, live, hits.to(tl.int32)


@triton.jit
def count_experts(
    expert_ids,
    counts,
    n,
    num_experts,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """counts[block, e]: how many slots of the block chose expert e; the empty ones are last."""
    _, _, hits = _one_hot(expert_ids, n, num_experts, SPAN, BLOCK, BINS)
    bins = tl.arange(0, BINS)
    at = tl.program_id(0) * (num_experts + 1) + bins
    tl.store(counts + at, tl.sum(hits, 0), mask=bins <= num_experts)


@triton.jit
def place_slots(
    expert_ids,
    counts,
    slots,
    offsets,
    n,
    num_experts,
    blocks,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Writes each slot of the block to its row; the first block writes the offsets as well."""
    block = tl.program_id(0)
    bins = tl.arange(0, BINS)
    before = tl.zeros([BINS], tl.int32)
    total = tl.zeros([BINS], tl.int32)
    for start in range(0, blocks, STEP):
        row = start + tl.arange(0, STEP)
        part = tl.load(
            counts + row[:, None] * (num_experts + 1) + bins[None, :],
            mask=(row < blocks)[:, None] & (bins <= num_experts)[None, :],
            other=0,
        )
        total += tl.sum(part, 0)
        before += tl.sum(tl.where((row < block)[:, None], part, 0), 0)
    first = tl.cumsum(total, 0) - total
    if block == 0:
        tl.store(offsets + bins, first, mask=bins <= num_experts)

    slot, live, hits = _one_hot(expert_ids, n, num_experts, SPAN, BLOCK, BINS)
    rank = tl.cumsum(hits, 0) - 1 + (first + before)[None, :]
    tl.store(slots + tl.sum(rank * hits, 1), slot, mask=live)


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
    tiles = (end - start + ROWS - 1) // ROWS
    last = tl.cumsum(tiles, 0)
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    mine = index == expert
    row = tl.sum(tl.where(mine, start + (tile - last + tiles) * ROWS, 0), 0)
    return expert, row, tl.sum(tl.where(mine, end, 0), 0)


def max_tiles(n: int, num_experts: int, rows: int) -> int:
    """Upper bound of the number of tiles, from shapes alone."""
    return triton.cdiv(n, rows) + min(num_experts, n)
