"""Compiles every kernel ahead of time for GPUs that need not be there, and checks that they fit.

    python -m dynamic_dino_kernels.aot                    # a target of each generation
    python -m dynamic_dino_kernels.aot --targets all
    python -m dynamic_dino_kernels.aot --targets sm_90 --dtypes bfloat16
    python -m dynamic_dino_kernels.aot --report           # and what their machine code does
    python -m dynamic_dino_kernels.aot --candidates       # what `tune` would try as well, an hour

What is compiled are the launches of the real operators, recorded for the shapes below: the detector
at one image and at sixteen, forward and backward. A row of the table is one kernel: its shared
memory, registers, and the stack that spilled registers would live on. Exits with 1 if a kernel
spills or wants more shared memory than the GPU has; candidates may, `tune` finds out by their time.

--report adds how many programs a multiprocessor holds at a time, and what stands in the main loop:
matrix instructions (HMMA, HGMMA, UTCHMMA) or ordinary ones (FFMA), copies to shared memory that
run meanwhile (LDGSTS), loads from it (LDSM, LDS); and the arithmetic done over the arithmetic that
the matrix products need: 1.50 where the first of two is computed twice.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from . import sass
from .backend import interpreted
from .launch import GPU, recorded_launches
from .moe.tiles import resident

# Shared memory per program by compute capability: CUDA C++ programming guide, table of technical
# specifications. Multiprocessors of one product each: A100, RTX A6000, Jetson Orin, RTX 4090, H200,
# B200, RTX 5090.
TARGETS = {
    gpu.name: gpu
    for gpu in (
        GPU("sm_80", processors=108, shared_memory=166912),
        GPU("sm_86", processors=84, shared_memory=101376),
        GPU("sm_87", processors=16, shared_memory=166912),
        GPU("sm_89", processors=128, shared_memory=101376),
        GPU("sm_90", processors=132, shared_memory=232448),
        GPU("sm_100", processors=148, shared_memory=232448),
        GPU("sm_120", processors=170, shared_memory=101376),
    )
}
# One for each kind of matrix instruction and size of shared memory; sm_87 is compiled as sm_80 is,
# sm_89 and sm_120 nearly as sm_86.
DEFAULT = ("sm_80", "sm_86", "sm_90", "sm_100")
DTYPES = ("float16", "bfloat16", "float32")
TOKENS = (900, 14400)
EXPERTS, DIM, HIDDEN, TOP_K = 16, 256, 1024, 2
HEADS, LEVELS = 8, [(80, 80), (40, 40), (20, 20)]

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Job:
    """One kernel as one operator would launch it on one GPU; `variant` says for which input."""

    target: str
    variant: str
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    options: tuple[tuple[str, int], ...]
    candidate: bool = False


@dataclass(frozen=True)
class Usage:
    """Of one program: bytes of shared memory, registers per thread, bytes of stack per thread, and
    what its code does, if that was asked for."""

    shared: int
    registers: int
    stack: int
    code: sass.Code | None = None


def jobs(target: str, dtype: torch.dtype, tokens: int, candidates: bool = False) -> Iterator[Job]:
    """The launches of all operators, with tensors that have shapes but no data."""
    from . import tune
    from .deform_attn import ops as deform_attn
    from .moe import ops as moe
    from .moe import router
    from .moe.precision import choose_precision
    from .moe.tiles import Problem, Tiles, pinned_tiles

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weights = [
        tensor(EXPERTS, HIDDEN, DIM),
        tensor(EXPERTS, HIDDEN),
        tensor(EXPERTS, DIM, HIDDEN),
        tensor(EXPERTS, DIM),
    ]
    x, gates = tensor(tokens, DIM), tensor(tokens, TOP_K, dtype=torch.float32)
    ids = tensor(tokens, TOP_K, dtype=torch.int32)
    value = tensor(1, sum(h * w for h, w in LEVELS), HEADS, DIM // HEADS)
    points = tensor(1, tokens, HEADS, len(LEVELS), 4, dtype=torch.float32)
    locations = tensor(*points.shape, 2, dtype=torch.float32)
    sampling = (value, [size for level in LEVELS for size in level], locations, points)
    with recorded_launches(TARGETS[target]) as launches:
        rows = tensor(EXPERTS, DIM, dtype=torch.float32)
        *_, blocks = router.forward(x, rows, TOP_K)
        router.forward_any(x, rows, rows[:, 0], EXPERTS, True)
        plain = (x, *weights, ids, None, None, None, None, None, 0.0, "relu")
        normed = (x, *weights, ids, gates, blocks, x, rows[0], rows[0], 1e-5, "relu")
        moe.forward(*plain, False, False)
        moe.forward(*normed, False, False)
        _, *plan, z, _, _ = moe.forward(*normed, True, True)
        moe.backward(x, x, *weights, ids, gates, *plan, z, "relu", True)
        moe.backward(x, x, *weights, ids, gates, *plan, z[:0], "relu", True)
        # SwiGLU without biases, as public models have it: half the units, the same arithmetic
        narrow = tensor(EXPERTS, DIM, HIDDEN // 2)
        gated = (x, weights[0], None, narrow, None, ids, gates)
        swiglu = (*gated, *[None] * 4, 0.0, "swiglu")
        moe.forward(*swiglu, False, False)
        _, *gated_plan, gated_z, _, _ = moe.forward(*swiglu, True, True)
        for saved in (gated_z, gated_z[:0]):
            moe.backward(x, *gated, *gated_plan, saved, "swiglu", True)
        with pinned_tiles(Tiles("two_gemms", rows=64 if dtype.itemsize <= 2 else 32)):
            moe.forward(*plain, False, False)
            moe.forward(*swiglu, False, False)
            moe.forward(*swiglu, True, True)
        deform_attn.forward(*sampling)
        deform_attn.backward(tensor(1, tokens, DIM), *sampling)
    variant = f"{str(dtype).removeprefix('torch.')} T={tokens}"
    for launch in launches:
        yield _job(target, variant, *launch)
    if not candidates:
        return
    for backward in (False, True):
        precision = choose_precision(dtype, TARGETS[target], backward)
        sizes = (tokens * TOP_K, EXPERTS, DIM, HIDDEN)
        problem = Problem(*sizes, dtype, backward, TOP_K, precision)
        for tiles in tune.candidates(problem, TARGETS[target], exhaustive=True):
            with recorded_launches(TARGETS[target]) as launches, pinned_tiles(tiles):
                if backward:
                    moe.backward(x, x, *weights, ids, gates, *plan, z, "relu", True)
                else:
                    moe.forward(*plain, False, False)
            for launch in launches:
                yield _job(target, variant, *launch, candidate=True)


def _job(target: str, variant: str, kernel, args: tuple, meta: dict, candidate=False) -> Job:
    options = {k: meta[k] for k in ("num_warps", "num_stages", "launch_pdl") if k in meta}
    constants = {k: v for k, v in meta.items() if k not in options}
    signature = {}
    for name, value in zip(kernel.arg_names, args, strict=False):
        signature[name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
    signature |= dict.fromkeys(constants, "constexpr")
    # In the order of the parameters, as the compiler wants it.
    ordered = tuple((name, signature[name]) for name in kernel.arg_names)
    return Job(
        target,
        variant,
        kernel.fn.__module__,
        kernel.fn.__name__,
        ordered,
        tuple(constants.items()),
        tuple(options.items()),
        candidate,
    )


def compile_job(job: Job, report: bool = False) -> Usage:
    """Compiles one kernel, and reads its code for a `report`. Raises what Triton raises if it
    can't."""
    compiled = compiled_kernel(job)
    code, cubin = None, compiled.asm["cubin"]
    if report:
        warps = compiled.metadata.num_warps
        code = sass.read(cubin, compiled.asm["ptx"], compiled.asm["ttgir"], warps)
    return Usage(compiled.metadata.shared, *sass.resources(cubin), code)


def compiled_kernel(job: Job):
    """Triton's CompiledKernel, with its `metadata` and its code, `asm`."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(job.module), job.kernel)
    pointers = [i for i, (_, kind) in enumerate(job.signature) if kind.startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=dict(job.signature),
        constexprs=dict(job.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},  # as torch allocates
    )
    target = GPUTarget("cuda", int(job.target.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=dict(job.options))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dynamic_dino_kernels.aot",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--targets", nargs="+", choices=[*TARGETS, "all"], default=list(DEFAULT))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--candidates", action="store_true", help="of `tune`, too")
    parser.add_argument("--once", action="store_true", help="of each kernel its first launch alone")
    parser.add_argument("--report", action="store_true", help="what the machine code does, too")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    if interpreted():
        parser.error("TRITON_INTERPRET=1 replaces the kernels by interpreted ones: unset it")

    targets = TARGETS if "all" in options.targets else options.targets
    todo = {
        job: None  # a dict keeps the order, and kernels that several inputs share come once
        for target in targets
        for dtype in options.dtypes
        for tokens in options.tokens
        for job in jobs(target, getattr(torch, dtype), tokens, options.candidates)
    }
    if options.once:
        first = {(job.target, job.kernel): job for job in reversed(todo)}
        todo = {job: None for job in todo if first[job.target, job.kernel] == job}
    head = f"{'target':8}{'input':17}{'kernel':22}{'shared':>8}{'regs':>6}{'stack':>7}  launch"
    print(head, "-" * len(head), sep="\n")
    failures = 0
    with ProcessPoolExecutor(options.workers) as pool:
        usages = pool.map(compile_job, todo, [options.report] * len(todo))
        for job, usage in zip(todo, usages, strict=True):
            gpu = TARGETS[job.target]
            limit = gpu.shared_memory
            problems = ["spills registers"] * (usage.stack > 0)
            problems += [f"needs more than {limit} bytes"] * (usage.shared > limit)
            failures += bool(problems) and not job.candidate
            launch = " ".join(f"{k}={v}" for k, v in job.options)
            sizes = " ".join(
                f"{k}={v}"
                for k, v in job.constants
                if k.startswith(("BLOCK", "ROWS", "PART", "GLU"))
            )
            print(
                f"{job.target:8}{job.variant:17}{job.kernel:22}{usage.shared:8}"
                f"{usage.registers:6}{usage.stack:7}  {sizes} {launch}"
                + "".join(f"  <- {problem}" for problem in problems)
            )
            if usage.code:
                warps = dict(job.options).get("num_warps", 4)  # Triton's default
                held = resident(gpu, warps, usage.registers, usage.shared)
                print(f"{'':25}{held} at a time; {usage.code}")
    print(f"{len(todo)} kernels compiled, {failures} don't fit")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
