"""Measures the ways to cut the expert FFN on the GPU at hand, and keeps the fastest.

    python -m dynamic_dino_kernels.tune                     # the detector's shapes, some minutes
    python -m dynamic_dino_kernels.tune --dim 256 --hidden 512 --tokens 900 --dtypes float16

Each candidate runs in a CUDA graph over several layers' weights, since those of one layer alone
would stay in the cache. The winners go to ``moe/tuned.json``, where `expert_ffn` looks first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from tqdm import tqdm
from triton.runtime.errors import OutOfResources

from .launch import gpu_of
from .moe.ops import triton_ffn
from .moe.tiles import TUNED, Problem, Tiles, choose_tiles, pinned_tiles, shared_memory
from .timing import captured, seconds

LAYERS = 6


def candidates(problem: Problem, shared: int) -> Iterator[Tiles]:
    """Every sensible combination that should fit."""
    for rows, hidden, splits, warps, stages in itertools.product(
        (16, 32, 64, 128), (16, 32, 64, 128), (1, 2, 4), (4, 8), (1, 2, 3)
    ):
        fits = shared_memory(problem, rows, hidden, stages) <= shared
        if fits and hidden * splits <= problem.hidden and rows * problem.dim >= warps * 1024:
            yield Tiles("fused", rows, hidden, splits, warps, stages)
    if not problem.backward:
        for rows, warps, stages in itertools.product((32, 64, 128), (4, 8), (2, 3, 4)):
            yield Tiles("two_gemms", rows, 64, 1, warps, stages)


class Bench:
    """The FFN of several layers with random weights and routing."""

    def __init__(self, problem: Problem, top_k: int) -> None:
        p, device = problem, "cuda"
        tokens = p.slots // top_k
        self.problem = problem
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
        self.ids = torch.rand(tokens, p.experts, device=device).argsort(1)[:, :top_k].int()
        self.gates = torch.ones(tokens, top_k, device=device)

    def step(self) -> None:
        with torch.set_grad_enabled(self.problem.backward):
            for layer in self.layers:
                y = triton_ffn(self.x, *layer, self.ids, self.gates, "relu")
                if self.problem.backward:
                    torch.autograd.grad(y, (self.x, *layer), y.detach())

    def seconds(self, tiles: Tiles, repeats: int) -> float:
        """Median time of a layer; infinite where the kernels don't fit the GPU after all."""
        forward = choose_tiles(replace(self.problem, backward=False), self.x.device)
        pinned = (forward, tiles) if self.problem.backward else (tiles,)
        try:
            with pinned_tiles(*pinned):
                replay = captured(self.step)
        except OutOfResources:
            return float("inf")
        return statistics.median(seconds(replay) for _ in range(repeats)) / LAYERS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dynamic_dino_kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[900, 1800, 3600, 7200, 14400])
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"])
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=1024, help="of one expert")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU to measure")

    gpu = gpu_of(torch.device("cuda"))
    table = json.loads(TUNED.read_text())
    for dtype, tokens, backward in itertools.product(options.dtypes, options.tokens, (False, True)):
        sizes = (options.experts, options.dim, options.hidden)
        problem = Problem(tokens * options.top_k, *sizes, getattr(torch, dtype), backward)
        bench = Bench(problem, options.top_k)
        estimate = choose_tiles(problem, bench.x.device)
        ways = list(dict.fromkeys([estimate, *candidates(problem, gpu.shared_memory)]))
        progress = tqdm(ways, desc=problem.key(gpu), leave=False)
        times = {tiles: bench.seconds(tiles, options.repeats) for tiles in progress}
        best = min(times, key=times.get)
        print(
            f"{problem.key(gpu)}: {times[best] * 1e6:.1f} us, estimate "
            f"{times[estimate] * 1e6:.1f} us, {best}"
        )
        table[problem.key(gpu)] = vars(best)
        TUNED.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(TUNED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
