"""The plan's invariants, on whatever hypothesis makes up."""

import pytest
import torch
from dynamic_dino_kernels.moe.plan import (
    find_rows_in_blocks,
    find_tile,
    make_plan,
    max_tiles,
    sort_in_blocks,
)
from helpers.seeds import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from triton import jit
from triton import language as tl


@st.composite
def routings(draw):
    experts = draw(st.integers(1, 9))
    tokens, slots = draw(st.integers(0, 150)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**31))
    ids = torch.randint(
        -1,
        experts,
        (tokens, slots),
        generator=torch.Generator("cpu").manual_seed(seed),
        device="cpu",
    )
    lonely = draw(st.integers(-1, experts - 1))
    if draw(st.booleans()):
        ids[ids != lonely] = lonely  # everything to one expert, or nothing to any
    return ids.int(), experts


@settings(max_examples=examples(25), deadline=None)
@given(routings())
def test_plan_is_the_stable_sort(case):
    ids, experts = case
    blocks = sort_in_blocks(ids.to(torch.get_default_device()), experts)
    plan = make_plan(blocks, ids.numel(), experts)
    flat = ids.flatten().long()
    counts = torch.bincount(flat[flat >= 0], minlength=experts)
    expected = torch.argsort(torch.where(flat < 0, experts, flat), stable=True)
    expected[counts.sum() :] = -1
    assert plan.slots.tolist() == expected.tolist()
    assert plan.offsets.tolist() == [0, *counts.cumsum(0).tolist()]


@jit
def list_rows(
    blocks, experts, slots, num_experts, num_blocks, SPAN: tl.constexpr, EXPERTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    expert, live, slot = find_rows_in_blocks(
        blocks, tile, num_experts, num_blocks, SPAN, EXPERTS, ROWS, BLOCKS
    )
    tl.store(experts + tile, expert)
    tl.store(slots + tile * ROWS + tl.arange(0, ROWS), tl.where(live, slot, -1))


@pytest.mark.slow
@settings(max_examples=examples(25), deadline=None)
@given(routings(), st.sampled_from([16, 32]))
def test_tiles_of_sorted_blocks_are_those_of_the_plan(case, rows):
    ids, experts = case
    if not ids.numel():
        return
    blocks = sort_in_blocks(ids.to(torch.get_default_device()), experts)
    tiles = max_tiles(ids.numel(), experts, rows) + 2
    owners, slots = torch.empty(tiles).int(), torch.empty(tiles, rows).int()
    list_rows[(tiles,)](
        blocks, owners, slots, experts, len(blocks), SPAN=32 * ids.shape[1], EXPERTS=16,
        ROWS=rows, BLOCKS=8,
    )  # fmt: skip
    flat, found = ids.flatten().tolist(), [[] for _ in range(experts)]
    for owner, row in zip(owners.tolist(), slots.tolist(), strict=True):
        row = [slot for slot in row if slot >= 0]
        assert not row or owner < experts
        if row:
            found[owner] += row
    for expert, mine in enumerate(found):
        assert mine == [slot for slot, owner in enumerate(flat) if owner == expert]


@jit
def list_tiles(
    offsets, experts, firsts, ends, num_experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr
):
    tile = tl.program_id(0)
    expert, first, end = find_tile(offsets, tile, num_experts, EXPERTS, ROWS)
    tl.store(experts + tile, expert)
    tl.store(firsts + tile, first)
    tl.store(ends + tile, end)


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("counts", [[0], [1], [5, 0, 33, 16, 0], [17, 32, 31, 33], [0, 0, 64]])
def test_tiles_cover_every_row_once(counts, rows):
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    places = max_tiles(sum(counts), len(counts), rows) + 2
    found = [torch.empty(places, dtype=torch.int32) for _ in range(3)]
    list_tiles[(places,)](offsets, *found, len(counts), EXPERTS=8, ROWS=rows)
    seen = []
    for expert, first, end in zip(*(f.tolist() for f in found), strict=True):
        if first < end:
            assert end == offsets[expert + 1]
            seen += range(first, min(first + rows, end))
    assert seen == list(range(sum(counts)))
