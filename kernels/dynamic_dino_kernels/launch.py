"""One way into Triton for all operators, so that every launch can also be recorded.

``python -m dynamic_dino_kernels.aot`` records the launches of an operator for shapes and a GPU that
need not be there, and compiles exactly those; `replay` records those of a call to repeat them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as tl_cuda


@dataclass(frozen=True)
class GPU:
    """What the choice of tiles depends on: compute capability ("sm_90"), streaming
    multiprocessors, bytes of shared memory that one program may use, and the product's name
    ("NVIDIA H100 PCIe"), "" where it doesn't matter."""

    name: str
    processors: int
    shared_memory: int
    product: str = ""

    @cached_property
    def dependent_launch(self) -> dict:
        """Of a kernel that waits for its inputs itself (`wait_for_inputs`): Hopper and later start
        it while the kernel before it ends. DYNAMIC_DINO_KERNELS_PDL=0 switches that off; it is read
        once, since every launch asks."""
        capability = int(self.name.removeprefix("sm_")) if self.name.startswith("sm_") else 0
        if capability < 90 or os.environ.get("DYNAMIC_DINO_KERNELS_PDL") == "0":
            return dict(PDL=False)
        return dict(PDL=True, launch_pdl=True)


INTERPRETER = GPU(name="interpreter", processors=1, shared_memory=232448)

_assumed: ContextVar[GPU | None] = ContextVar("assumed_gpu", default=None)
_recorder: ContextVar[Callable | None] = ContextVar("launch_recorder", default=None)
_observer: ContextVar[Callable | None] = ContextVar("launch_observer", default=None)


def gpu_of(device: torch.device) -> GPU:
    return _assumed.get() or _query(device)


@cache
def _query(device: torch.device) -> GPU:
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    return GPU(
        f"sm_{properties.major}{properties.minor}",
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # not in the stub
        properties.name,
    )


def launch(kernel, grid: tuple[int, ...], *args, **meta) -> None:
    """`kernel[grid](*args, **meta)` on the GPU of the first argument, a tensor; or its record."""
    if 0 in grid:
        return
    if recorder := _recorder.get():
        recorder(kernel, args, meta)
        return
    device = args[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current one
            compiled = kernel[grid](*args, **meta)
    else:
        compiled = kernel[grid](*args, **meta)
    if observer := _observer.get():
        observer(compiled, grid, kernel.arg_names, args, meta)


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Until the kernel launched before has written all that it writes: the first thing to do, for
    one that is launched with `GPU.dependent_launch`."""
    if PDL:
        tl_cuda.gdc_wait()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """The kernel launched next may be set up on multiprocessors that become free; it still waits
    for everything that this one writes."""
    if PDL:
        tl_cuda.gdc_launch_dependents()


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """In which kernels add up: float32, or float64 where a tensor is that wide."""
    wide = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def sum_type(*tensors: Tensor) -> tl.dtype:
    """`sum_dtype` in Triton's words."""
    return tl.float64 if sum_dtype(*tensors) == torch.float64 else tl.float32


@contextmanager
def recorded_launches(gpu: GPU) -> Iterator[list[tuple]]:
    """Collects (kernel, args, meta) of all launches in the context instead of running them."""
    launches: list[tuple] = []
    tokens = _assumed.set(gpu), _recorder.set(lambda *launch: launches.append(launch))
    try:
        yield launches
    finally:
        _assumed.reset(tokens[0])
        _recorder.reset(tokens[1])


@contextmanager
def observed_launches() -> Iterator[list[tuple]]:
    """Collects (compiled kernel, grid, names of the parameters, args, meta) of all launches in the
    context, which also run."""
    launches: list[tuple] = []
    token = _observer.set(lambda *launch: launches.append(launch))
    try:
        yield launches
    finally:
        _observer.reset(token)


def recording() -> bool:
    """Whether launches are only recorded, or observed, in this context."""
    return _recorder.get() is not None or _observer.get() is not None
