"""Measures the ways to cut the expert FFN on the GPU at hand, and keeps the fastest.

    python -m dynamic_dino_kernels.tune                                # the detector's shapes
    python -m dynamic_dino_kernels.tune --seconds 120 --forward-only   # the most useful ones first
    python -m dynamic_dino_kernels.tune --dim 256 --hidden 512 --tokens 900 --dtypes float16

Each candidate runs in a CUDA graph over several layers' weights, since those of one layer alone
would stay in the cache. The winners go to ~/.cache/dynamic_dino_kernels/tuned.json (or the file
that DYNAMIC_DINO_KERNELS_TUNED names), where `expert_ffn` looks first. Whatever was measured is
kept when the time is over, or when the run is interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch
from tqdm import tqdm

from .backend import interpreted
from .launch import GPU, gpu_of, recorded_launches
from .moe import tuned
from .moe.ops import triton_ffn
from .moe.precision import choose_precision
from .moe.tiles import (
    SPLITS,
    Problem,
    Tiles,
    best_splits,
    choose_tiles,
    pinned_tiles,
    shared_memory,
    ways,
)
from .timing import captured, seconds

LAYERS = 6
SHORT = 40  # candidates of a problem, unless all are asked for
DTYPES = ("float16", "bfloat16", "float32", "tf32")


# ---- candidates ---------------------------------------------------------------------------------


def candidates(problem: Problem, gpu: GPU, exhaustive: bool = False) -> list[Tiles]:
    """Ways to try, the likely ones first: about 40, or every sensible combination. They should
    fit; `exhaustive` is generous there, since the compiled kernels will say."""
    found = _all(problem) if exhaustive else itertools.chain(_near(problem, gpu), _around(problem))
    limit = gpu.shared_memory * (1.5 if exhaustive else 1)
    fitting = (t for t in found if shared_memory(problem, t, gpu) <= limit and _sane(problem, t))
    distinct = dict.fromkeys(fitting)
    return list(distinct if exhaustive else itertools.islice(distinct, SHORT))


def _near(problem: Problem, gpu: GPU) -> Iterator[Tiles]:
    """What the estimate considers, each with the splits around the best."""
    for tiles in ways(problem, gpu):
        at = SPLITS.index(best_splits(problem, tiles, gpu))
        near = (SPLITS[at], *SPLITS[at + 1 : at + 2], *SPLITS[max(0, at - 1) : at])
        for splits in near if tiles.form == "fused" else (1,):
            yield replace(tiles, splits=splits)


def _around(problem: Problem) -> Iterator[Tiles]:
    """What the estimate does not consider, near the rows that the load asks for."""
    load = problem.load
    wanted = (16, 32) if load <= 16 else (32, 16, 64) if load <= 64 else (64, 128, 32)
    if not problem.backward:
        depths = (3,) if problem.tensor_cores else (3, 4, 2)  # or most of the list would be these
        for stages, warps, rows in itertools.product(depths, (4, 8), wanted):
            yield Tiles("two_gemms", rows, 32, 1, warps, stages)
    if problem.tensor_cores:
        blocks = ((32, 4), (64, 8), (64, 4), (32, 8))
        for stages, rows, (hidden, warps), splits in itertools.product(
            (2, 3), wanted, blocks, (1, 2, 3, 4, 6) if load <= 256 else (1, 2)
        ):
            yield Tiles("fused", rows, hidden, splits, warps, stages)
    else:
        for rows, warps, splits in itertools.product((16, 32), (4, 8), SPLITS):
            yield Tiles("fused", rows, 16, splits, warps, 2)


def _all(problem: Problem) -> Iterator[Tiles]:
    for rows, hidden, splits, warps, stages in itertools.product(
        (16, 32, 64, 128), (16, 32, 64, 128), SPLITS, (4, 8), (1, 2, 3, 4)
    ):
        yield Tiles("fused", rows, hidden, splits, warps, stages)
    if not problem.backward:
        for rows, warps, stages in itertools.product((16, 32, 64, 128), (4, 8), (1, 2, 3, 4)):
            yield Tiles("two_gemms", rows, 32, 1, warps, stages)


def _sane(problem: Problem, tiles: Tiles) -> bool:
    """Without programs that have nothing to do, threads that have next to nothing, and sums that
    are sure to spill."""
    if tiles.form == "two_gemms":
        return True
    values = tiles.rows * problem.dim
    return (
        tiles.hidden * tiles.splits <= max(problem.hidden, tiles.hidden)
        and values >= tiles.warps * 512
        and values <= tiles.warps * 32 * 160
    )


# ---- measuring ----------------------------------------------------------------------------------


class Bench:
    """The FFN of several layers with random weights and routing, on one device."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        p = self.problem = problem
        self.device, self.gpu = device, gpu_of(device)
        tokens = p.slots // p.top_k
        self.layers = [
            [
                torch.randn(shape, device=device, dtype=p.dtype).requires_grad_()
                for shape in (
                    (p.experts, p.hidden, p.dim),
                    (p.experts, p.hidden),
                    (p.experts, p.dim, p.hidden),
                    (p.experts, p.dim),
                )
            ]
            for _ in range(LAYERS)
        ]
        self.x = torch.randn(tokens, p.dim, device=device, dtype=p.dtype, requires_grad=True)
        self.ids = torch.rand(tokens, p.experts, device=device).argsort(1)[:, : p.top_k].int()
        self.gates = torch.ones(tokens, p.top_k, device=device)
        precision = choose_precision(p.dtype, self.gpu)
        forward = replace(p, backward=False, precision=precision) if p.backward else p
        self.forward = choose_tiles(forward, device)
        self.check()  # the tensors are there before another stream reads them

    def step(self, layers: int = LAYERS) -> None:
        with torch.set_grad_enabled(self.problem.backward):
            for layer in self.layers[:layers]:
                y = triton_ffn(self.x, *layer, self.ids, self.gates, "relu")
                if self.problem.backward:
                    torch.autograd.grad(y, (self.x, *layer), y.detach())

    def pinned(self, tiles: Tiles):
        return pinned_tiles(self.forward, tiles) if self.problem.backward else pinned_tiles(tiles)

    def compile(self, ways: Iterable[Tiles], workers: int) -> dict[Tiles, str]:
        """Compiles the kernels of all `ways` in that many threads, which Triton leaves free to run
        while it works. Returns what is wrong with those that don't compile, or don't fit."""
        if interpreted():
            return {}
        from triton import AsyncCompileMode

        compiled: dict[Tiles, list] = {}
        wrong: dict[Tiles, str] = {}
        with ThreadPoolExecutor(workers) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for tiles in ways:
                # One layer; its gradient needs no values.
                with recorded_launches(self.gpu) as launches, self.pinned(tiles):
                    self.step(layers=1)
                compiled[tiles] = [
                    kernel.warmup(*args, grid=(1,), **meta) for kernel, args, meta in launches
                ]
        for tiles, kernels in compiled.items():
            try:
                done = [k.result() if hasattr(k, "result") else k for k in kernels]
                shared = max(kernel.metadata.shared for kernel in done)
                if shared > self.gpu.shared_memory:
                    wrong[tiles] = f"needs {shared} bytes of {self.gpu.shared_memory}"
            except Exception as error:  # whatever the compiler raises
                wrong[tiles] = _line(error)
        return wrong

    def seconds(self, tiles: Tiles, repeats: int) -> float:
        """Median time of a layer. Raises what the compiler or the launch raises."""
        with self.pinned(tiles):
            replay = captured(self.step)
        return statistics.median(seconds(replay) for _ in range(repeats)) / LAYERS

    def check(self) -> None:
        """Raises where an error left the GPU unusable: nothing after it could be measured."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def tune(
    problems: list[Problem],
    device: torch.device,
    keep: Callable[[Problem, Tiles], None],
    budget: float | None = None,
    repeats: int = 20,
    workers: int = 1,
    exhaustive: bool = False,
    bench: Callable[[Problem, torch.device], Bench] = Bench,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Measures the problems one after the other, and hands the fastest way of each to `keep`.

    budget: seconds for all; what is left is shared among the problems that are left. The choice
    so far comes first, and a batch of candidates is compiled, then measured, before the next:
    whenever the time is over, the best of those measured is kept, of at least two.
    """
    gpu, start = gpu_of(device), clock()
    for index, problem in enumerate(problems):
        end = float("inf")
        if budget is not None:
            left = start + budget - clock()
            if left <= 0:
                print(f"time is over: {len(problems) - index} problems weren't measured")
                return
            end = clock() + left / (len(problems) - index)
        times: dict[Tiles, float] = {}
        try:
            with _rounded(problem):
                estimate = choose_tiles(problem, device)
                todo = list(dict.fromkeys([estimate, *candidates(problem, gpu, exhaustive)]))
                one = bench(problem, device)
                for tiles, time_taken in _measure(one, todo, repeats, workers, end, clock):
                    times[tiles] = time_taken
        finally:
            if len(times) > 1:
                best = min(times, key=times.get)
                keep(problem, best)
                before = f"{times[estimate] * 1e6:.1f} us" if estimate in times else "unfit"
                print(
                    f"{problem.key(gpu.product or gpu.name)}: {times[best] * 1e6:.1f} us, "
                    f"before {before}, {len(times)} of {len(todo)} measured, {best}"
                )


def _measure(
    bench: Bench,
    todo: list[Tiles],
    repeats: int,
    workers: int,
    end: float,
    clock: Callable[[], float],
) -> Iterator[tuple[Tiles, float]]:
    size = max(4, 2 * workers)
    progress = tqdm(total=len(todo), leave=False)
    for first in range(0, len(todo), size):
        batch = todo[first : first + size]
        if clock() >= end:
            break
        wrong = bench.compile(batch, workers)
        for tiles in batch:
            if clock() >= end:
                break
            progress.update()
            if tiles in wrong:
                tqdm.write(f"skipped {tiles}: {wrong[tiles]}")
                continue
            try:
                yield tiles, bench.seconds(tiles, repeats)
            except Exception as error:  # of the compiler, the launch or the capture
                tqdm.write(f"skipped {tiles}: {_line(error)}")
                bench.check()
    progress.close()


@contextmanager
def _rounded(problem: Problem) -> Iterator[None]:
    """PyTorch set to TF32 where the problem wants it; else it stays as it is."""
    if problem.precision != "tf32":
        yield
        return
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _line(error: Exception) -> str:
    """The first and the last line: Triton's errors say where, show the code, and say what."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' ... '.join(dict.fromkeys(lines[:1] + lines[-1:]))[:200]}"


# ---- command ------------------------------------------------------------------------------------


def problems_of(options: argparse.Namespace, gpu: GPU) -> list[Problem]:
    """The most useful first: few tokens before many, forward before backward."""
    directions = (False,) if options.forward_only else (False, True)
    found = []
    for tokens, backward, name in itertools.product(options.tokens, directions, options.dtypes):
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        precision = "tf32" if name == "tf32" else choose_precision(dtype, gpu, backward)
        sizes = (tokens * options.top_k, options.experts, options.dim, options.hidden)
        found.append(Problem(*sizes, dtype, backward, options.top_k, precision))
    return list(dict.fromkeys(found))


class Keeper:
    """Writes what was found to a file at once; if that fails, says so once and collects it."""

    def __init__(self, gpu: GPU, ship: bool = False) -> None:
        # What is shipped stands for the whole architecture as well.
        self.names = [gpu.product or gpu.name] + [gpu.name] * ship
        self.path = tuned.SHIPPED if ship else tuned.user_file()
        self.unwritten: dict[str, Tiles] = {}

    def __call__(self, problem: Problem, tiles: Tiles) -> None:
        entries = {problem.key(name): tiles for name in self.names}
        try:
            tuned.save(self.path, self.unwritten | entries)
            self.unwritten = {}
        except OSError as error:
            if not self.unwritten:
                print(
                    f"{self.path} can't be written ({error}): name another file in "
                    f"{tuned.ENVIRONMENT_VARIABLE}; the results are printed at the end",
                    file=sys.stderr,
                )
            self.unwritten |= entries


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dynamic_dino_kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[900, 1800, 3600, 7200, 14400])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=1024, help="of one expert")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, help="for the whole run")
    parser.add_argument("--forward-only", action="store_true", help="no backward passes")
    parser.add_argument("--exhaustive", action="store_true", help="all candidates, not about 40")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads that compile")
    parser.add_argument("--ship", action="store_true", help="write the package's table instead")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU to measure")

    device = torch.device("cuda", torch.cuda.current_device())
    gpu = gpu_of(device)
    keeper = Keeper(gpu, options.ship)
    try:
        tune(
            problems_of(options, gpu), device, keeper, options.seconds, options.repeats,
            options.workers, options.exhaustive,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        if keeper.unwritten:
            plain = {key: vars(tiles) for key, tiles in keeper.unwritten.items()}
            print(json.dumps(plain, indent=1))
        else:
            print(keeper.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
