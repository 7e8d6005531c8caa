"""One way into Triton for all operators, so that every launch can also be recorded.

``python -m dynamic_dino_kernels.aot`` records the launches of an operator for shapes and a GPU that
need not be there, and compiles exactly those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class GPU:
    """What the choice of tiles depends on: compute capability ("sm_90"), streaming
    multiprocessors, bytes of shared memory that one program may use, and the product's name
    ("NVIDIA H100 PCIe"), "" where it doesn't matter."""

    name: str
    processors: int
    shared_memory: int
    product: str = ""


INTERPRETER = GPU(name="interpreter", processors=1, shared_memory=232448)

_assumed: ContextVar[GPU | None] = ContextVar("assumed_gpu", default=None)
_recorder: ContextVar[Callable | None] = ContextVar("launch_recorder", default=None)


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
        properties.shared_memory_per_block_optin,
        properties.name,
    )


def launch(kernel, grid: tuple[int, ...], *args, **meta) -> None:
    """kernel[grid](*args, **meta) on the GPU of the first argument, a tensor; or its record."""
    if 0 in grid:
        return
    if recorder := _recorder.get():
        recorder(kernel, args, meta)
        return
    device = args[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current one
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)


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
