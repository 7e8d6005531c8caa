"""How the expert FFN is cut into programs: tile sizes, splits, warps, pipeline stages.

A pure function of shapes, dtype and device: a result doesn't depend on what ran before, and nothing
is tuned while a model trains. What was measured with ``python -m dynamic_dino_kernels.tune`` stands
in ``tuned.json``; everything else is estimated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton

from ..launch import GPU, gpu_of

SMALLEST = 16  # rows, columns and depth that the matrix units take at least
TUNED = Path(__file__).with_name("tuned.json")


def block_size(size: int, least: int = SMALLEST) -> int:
    """The power of two, not below `least`, that a block needs to hold `size` values."""
    return max(least, triton.next_power_of_2(size))


@dataclass(frozen=True)
class Tiles:
    """One way to run the expert FFN.

    form    "fused" (one launch, the hidden layer stays on the chip) or "two_gemms"
    rows    of a tile, slots of one expert
    hidden  hidden units at a time
    splits  programs that share the hidden units of a tile (fused, and backward)
    warps   per program
    stages  of the software pipeline
    """

    form: str = "fused"
    rows: int = 32
    hidden: int = 32
    splits: int = 1
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Problem:
    """What the choice depends on: N slots, E experts, widths D and H, dtype, direction."""

    slots: int
    experts: int
    dim: int
    hidden: int
    dtype: torch.dtype
    backward: bool = False

    def key(self, gpu: GPU) -> str:
        """Name in the table of measured choices: the mean load of an expert counts, to a power of
        two, not its exact value."""
        load = round(math.log2(max(1, self.slots / max(1, self.experts))))
        dtype = str(self.dtype).removeprefix("torch.")
        direction = "backward" if self.backward else "forward"
        return f"{gpu.name} {dtype} D={self.dim} H={self.hidden} load=2^{load} {direction}"


_pinned: dict[bool, Tiles] = {}  # by direction; no ContextVar: backward runs in another thread


@contextmanager
def pinned_tiles(tiles: Tiles, backward: Tiles | None = None) -> Iterator[None]:
    """Runs every expert FFN of this context in the given way (`backward`: another one there)."""
    before = dict(_pinned)
    _pinned.update({False: tiles, True: backward or tiles})
    try:
        yield
    finally:
        _pinned.clear()
        _pinned.update(before)


def pinned() -> tuple[Tiles, ...]:
    """What `pinned_tiles` says, forward and backward; empty where it says nothing."""
    return tuple(_pinned.values())


def choose_tiles(problem: Problem, device: torch.device) -> Tiles:
    """The pinned tiles if there are any, else those measured for the problem, else an estimate."""
    if pinned := _pinned.get(problem.backward):
        return pinned
    gpu = gpu_of(device)
    measured = _table().get(problem.key(gpu))
    return Tiles(**measured) if measured else _estimate(problem, gpu)


@cache
def _table() -> dict[str, dict]:
    return json.loads(TUNED.read_text())


@cache
def _estimate(problem: Problem, gpu: GPU) -> Tiles:
    """Rows follow the mean load of an expert; hidden units what fits; splits fill the GPU."""
    load = problem.slots / max(1, problem.experts)
    rows = 16 if load <= 16 else 32 if load <= 64 else 64
    hidden = min(64, block_size(problem.hidden))
    if problem.backward:
        rows, hidden = min(rows, 32), min(hidden, 32)
    if problem.dtype.itemsize > 2:  # no matrix units: operands live in registers as well
        rows, hidden = 16, 16
    stages = 2
    while shared_memory(problem, rows, hidden, stages) > gpu.shared_memory:
        if stages > 1:
            stages = 1
        elif hidden > SMALLEST:
            hidden, stages = hidden // 2, 2
        elif rows > SMALLEST:
            rows //= 2
        else:
            break
    tiles = max(1, round(problem.slots / rows + min(problem.experts, problem.slots) / 2))
    splits = 1
    while tiles * splits < gpu.processors and splits < 4 and hidden * splits * 2 <= problem.hidden:
        splits *= 2
    values = rows * problem.dim * problem.dtype.itemsize * (2 if problem.backward else 1)
    warps = 8 if values >= 16384 else 4  # so that they don't spill
    return Tiles("fused", rows, hidden, splits, warps, stages)


def shared_memory(problem: Problem, rows: int, hidden: int, stages: int) -> int:
    """Bytes that a fused program needs, about: its tokens, and a block of both weights a stage."""
    width = block_size(problem.dim)
    tokens = (2 if problem.backward else 1) * rows * width
    return (tokens + 2 * stages * width * hidden + rows * hidden) * problem.dtype.itemsize
