"""How the expert FFN is cut into programs: tile sizes, splits, warps, pipeline stages.

A function of shapes, types and device: a result doesn't depend on what ran before, and nothing is
tuned while a model trains. What ``python -m dynamic_dino_kernels.tune`` measured comes first
(`tuned.py`); everything else is estimated. Whether a kernel fits its GPU is in the end for the
compiled kernel to say: see `run_fitting`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources

from ..launch import GPU, gpu_of
from .tuned import Tiles, table

SMALLEST = 16  # rows, columns and depth that the matrix units take at least
SPLITS = (1, 2, 3, 4, 6)
REGISTERS = 65536  # of a multiprocessor; a thread has 255 at most
SYSTEM_SHARED = 1024  # bytes of shared memory that every program has besides its own

Result = TypeVar("Result")


def block_size(size: int, least: int = SMALLEST) -> int:
    """The power of two, not below `least`, that a block needs to hold `size` values."""
    return max(least, triton.next_power_of_2(size))


def block_side(dtype: torch.dtype) -> int:
    """Of a block of a weight: 128 bytes, so that what is summed stays in registers."""
    return max(SMALLEST, 128 // dtype.itemsize)


@dataclass(frozen=True)
class Problem:
    """What the choice depends on: N slots, E experts, widths D and H, dtype, direction, K slots of
    a token, and how float32 is rounded ("ieee", "tf32", "tf32x3"; other types: "ieee")."""

    slots: int
    experts: int
    dim: int
    hidden: int
    dtype: torch.dtype
    backward: bool = False
    top_k: int = 1
    precision: str = "ieee"

    @property
    def load(self) -> float:
        """Mean number of slots of an expert."""
        return self.slots / max(1, self.experts)

    @property
    def tensor_cores(self) -> bool:
        """Whether one product is one product of the matrix units."""
        return self.dtype.itemsize == 2 or self.precision == "tf32"

    def key(self, gpu: str) -> str:
        """Name in the table of measured choices, on a product ("NVIDIA H100 PCIe") or architecture
        ("sm_90"): the mean load of an expert counts to a power of two, not its exact value."""
        load = round(math.log2(max(1, self.load)))
        dtype = str(self.dtype).removeprefix("torch.")
        dtype += f"/{self.precision}" if self.dtype == torch.float32 else ""
        direction = "backward" if self.backward else "forward"
        sizes = f"D={self.dim} H={self.hidden} E={self.experts} K={self.top_k}"
        return f"{gpu} {dtype} {sizes} load=2^{load} {direction}"


# ---- the choice ---------------------------------------------------------------------------------

_pinned: dict[bool, Tiles] = {}  # by direction; no ContextVar: backward runs in another thread
_unfit: set[tuple[GPU, Problem, Tiles]] = set()  # what compiled kernels said, whatever the splits


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
    """The pinned tiles if there are any, else those measured for the problem on this product, or
    on another one of its architecture, else an estimate."""
    if pinned := _pinned.get(problem.backward):
        return pinned
    gpu, measured = gpu_of(device), table()
    for name in (gpu.product, gpu.name):
        tiles = measured.get(problem.key(name)) if name and measured else None
        if tiles and not _is_unfit(gpu, problem, tiles):
            return tiles
    return _estimate(problem, gpu)


def run_fitting(problem: Problem, device: torch.device, run: Callable[[Tiles], Result]) -> Result:
    """run(tiles) with `choose_tiles`' choice; where a compiled kernel wants more of the GPU than it
    has, with the next smaller choice, which then stands for the rest of the process.

    Raises:
        triton.runtime.errors.OutOfResources: the pinned tiles don't fit.
        RuntimeError: none do.
    """
    while True:
        tiles = choose_tiles(problem, device)
        try:
            return run(tiles)
        except OutOfResources as error:
            gpu = gpu_of(device)
            if problem.backward in _pinned:
                raise
            if _is_unfit(gpu, problem, tiles):
                name = gpu.product or gpu.name
                raise RuntimeError(
                    f"no kernel for D={problem.dim} in {problem.dtype} fits {name} "
                    f"({error}): choose backend='grouped', or a narrower type"
                ) from error
            _unfit.add(_fit_key(gpu, problem, tiles))
            _estimate.cache_clear()


def _fit_key(gpu: GPU, problem: Problem, tiles: Tiles) -> tuple[GPU, Problem, Tiles]:
    """What decides whether a kernel fits: neither the number of slots nor that of splits."""
    return gpu, replace(problem, slots=0), replace(tiles, splits=1)


def _is_unfit(gpu: GPU, problem: Problem, tiles: Tiles) -> bool:
    return bool(_unfit) and _fit_key(gpu, problem, tiles) in _unfit


# ---- the estimate -------------------------------------------------------------------------------


@cache
def _estimate(problem: Problem, gpu: GPU) -> Tiles:
    """The first of `ways` that should fit, and didn't fail to; its splits fill the GPU."""
    for tiles in ways(problem, gpu):
        fits = shared_memory(problem, tiles, gpu) <= gpu.shared_memory
        if fits and not _is_unfit(gpu, problem, tiles):
            break
    if tiles.form == "two_gemms":
        return tiles
    return replace(tiles, splits=best_splits(problem, tiles, gpu))


def ways(problem: Problem, gpu: GPU) -> Iterator[Tiles]:
    """Ways without splits, best first by what the compiler makes of them: no product computed twice
    and no spilled registers at D = 256 (``aot --report``). The last one fits everywhere."""
    wanted = 16 if problem.load <= 16 else 32 if problem.load <= 64 else 64
    if problem.tensor_cores:
        # Fewer than half the rows would read the weights more often than two launches do.
        least = 16 if problem.backward else wanted // 2
        for rows in (r for r in (64, 32, 16) if least <= r <= wanted):
            for hidden, warps, stages in _fused_blocks(problem, gpu, rows):
                if _in_registers(problem, rows, warps):
                    hidden = min(hidden, block_size(problem.hidden))
                    yield Tiles("fused", rows, hidden, 1, warps, stages)
    elif problem.backward or problem.dtype.itemsize > 4:
        # No matrix units, or float64: the operands live in registers as well.
        warps = 8 if problem.backward and gpu.name != "sm_100" else 4  # what doesn't spill
        for stages in (2, 1):
            yield Tiles("fused", 16, 16, 1, warps, stages)
    if problem.backward:
        yield Tiles("fused", 16, 16, 1, 8, 1)
    else:
        ordinary = problem.dtype == torch.float32 and problem.precision == "ieee"
        yield Tiles("two_gemms", min(wanted, 32) if ordinary else wanted, 32, 1, 4, 3)
        yield Tiles("two_gemms", 16, 32, 1, 4, 1)


def _fused_blocks(problem: Problem, gpu: GPU, rows: int) -> Iterator[tuple[int, int, int]]:
    """Hidden units, warps and stages for a number of rows.

    Where each warp multiplies on its own, the first product is shared by all of them without
    duplication from 8 hidden units a warp on; Hopper's groups of four warps share 64 rows only one
    after the other, so that a second group would compute the first product again.
    """
    if problem.backward:
        if rows <= 32:  # two products with the tokens at a time: 64 rows spill
            yield from ((32, 4, 2), (32, 4, 1), (16, 4, 1))
    elif rows < 64:
        yield from ((64, 4, 2), (32, 4, 3), (32, 4, 2))
    elif gpu.name == "sm_90":
        yield from ((32, 4, 3), (32, 4, 2))
    elif problem.dtype.itemsize == 2:
        yield 64, 8, 2


def _in_registers(problem: Problem, rows: int, warps: int) -> bool:
    """Whether the sums of a tile take at most half of the threads' registers."""
    return rows * block_size(problem.dim) <= warps * 32 * 128


def best_splits(problem: Problem, tiles: Tiles, gpu: GPU) -> int:
    """So that the busiest multiprocessor has the fewest hidden units to do, in a single wave: a
    second wave costs as much as the first, however few programs it has. Of equal ones the fewest,
    since every split writes its sums."""
    experts = min(problem.experts, problem.slots)
    programs = max(1, round(problem.slots / tiles.rows + experts / 2))  # in the mean
    wave = gpu.processors * resident(gpu, tiles.warps, 255, shared_memory(problem, tiles, gpu))

    def busiest(splits: int) -> int:
        part = triton.cdiv(triton.cdiv(problem.hidden, splits), tiles.hidden) * tiles.hidden
        return triton.cdiv(programs * splits, gpu.processors) * part

    possible = [s for s in SPLITS if programs * s <= wave and tiles.hidden * s <= problem.hidden]
    return min(possible, key=busiest, default=1)


def resident(gpu: GPU, warps: int, registers: int, shared: int) -> int:
    """Programs that a multiprocessor holds at a time, by warps, registers of a thread, and shared
    memory of a program; at least 1. Table of technical specifications, CUDA programming guide."""
    limit = 48 if gpu.name in ("sm_86", "sm_87", "sm_89", "sm_120") else 64
    by_registers = REGISTERS // (warps * 32 * (triton.cdiv(max(registers, 1), 8) * 8))
    by_shared = (gpu.shared_memory + SYSTEM_SHARED) // (shared + SYSTEM_SHARED)
    return max(1, min(limit // warps, by_registers, by_shared))


def shared_memory(problem: Problem, tiles: Tiles, gpu: GPU) -> int:
    """Bytes of shared memory that a program needs, as Triton 3.6 lays them out; not less.

    A block of each operand that comes from memory in a loop is kept `stages` times where products
    read it from shared memory (Hopper's and Blackwell's, from 64 rows on), else once less: the last
    one is in registers already. With one stage there is no pipeline, and they take turns.
    """
    size, rows = problem.dtype.itemsize, tiles.rows
    matrix_units = size == 2 or problem.precision != "ieee"
    from_shared = gpu.name in ("sm_90", "sm_100") and rows >= 64 and matrix_units
    buffers = tiles.stages - (0 if from_shared else 1)
    if tiles.form == "two_gemms":
        side = block_side(problem.dtype)
        return (max(1, buffers) * (rows + 2 * side) + rows) * side * size
    width = block_size(problem.dim)
    tokens, weights, layers = (2, 3, 3) if problem.backward else (1, 2, 1)
    blocks = weights * buffers if tiles.stages > 1 else 1
    values = (tokens * rows + blocks * tiles.hidden) * width + layers * rows * tiles.hidden
    return values * size + 4096  # for what a program looks up before its loop
