"""Calls without gradient whose launches are known, repeated without Triton's and torch's dispatch.

At batch 1 a detector waits for Python: finding a compiled kernel anew costs about 12 microseconds a
launch, `torch.library` 10 an operator, while the kernels themselves take a few. So the first call
with a new combination of shapes and types runs as it is, observed; later ones only look the
combination up, allocate the results and one buffer for all that lies between, and hand the
pointers to the kernels that Triton compiled. Nothing is kept but the list of launches: memory comes
from PyTorch's allocator at every call, so streams, threads and CUDA graphs need no care.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime import driver

from .backend import interpreted
from .launch import observed_launches, recording

logger = logging.getLogger(__name__)

ALIGNMENT = 16  # bytes; Triton compiles other code for pointers that aren't multiples
MOST = 4096  # recordings of one function
_INTERPRETED = interpreted()  # as the kernels were when they were defined


class Replayed:
    """A function of tensors that allocates and launches, and does nothing else.

    function(*tensors, *constants) -> Tensor or None, or a tuple of them, where every tensor of the
    result was allocated by it. Calls that can't be repeated, since gradients, autocast, tracing or
    another mode of PyTorch is on, tensors aren't contiguous or lie on another device than Triton's
    current one, are refused by `find`.

    Args:
        state: of the first tensor, what else decides which kernels run, a setting of PyTorch's for
            example; it must be hashable.
    """

    def __init__(self, function: Callable, state: Callable[[Any], object] | None = None) -> None:
        self.function, self.state = function, state
        self._recordings: dict[tuple, _Recording | None] = {}

    def find(self, tensors: tuple[Tensor | None, ...], constants: tuple) -> Call | None:
        """What to call for the result, without arguments; None: this can't be repeated.

        Everything that the function's result and checks depend on, but for values in tensors, must
        be among the constants, or be seen in shape and dtype of the tensors.
        """
        if not possible():
            return None
        device = driver.active.get_current_device()
        pointers: list[int] = []
        seen: list[object] = [device, constants]
        for t in tensors:
            if t is None:
                pointers.append(0)
                seen.append(None)
                continue
            if type(t) not in _PLAIN or t.get_device() != device or not t.is_contiguous():
                return None
            pointer = t.data_ptr()
            if pointer == 0 or pointer % ALIGNMENT:
                return None
            pointers.append(pointer)
            seen.append(t.shape)
            seen.append(t.dtype)
        if self.state is not None:
            seen.append(self.state(tensors[0]))
        key = tuple(seen)
        if key in self._recordings:
            recording = self._recordings[key]
            if recording is None:
                return None
            return Call(self, key, tensors, constants, pointers, recording)
        return Call(self, key, tensors, constants, pointers, None)

    def record(self, key: tuple, tensors: tuple[Tensor | None, ...], constants: tuple):
        with observed_launches() as launches, _Allocations() as allocations:
            result = self.function(*tensors, *constants)
        try:
            recording = _Recording.of(tensors, result, launches, allocations)
        except _CantReplay as error:
            recording = None
            logger.debug("%s is not replayed: %s", self.function.__qualname__, error)
        if len(self._recordings) >= MOST:
            self._recordings.clear()
        self._recordings[key] = recording
        return result


@dataclass(slots=True)
class Call:
    """A call that can be repeated; `known`: it was recorded before, so its arguments are right."""

    replayed: Replayed
    key: tuple
    tensors: tuple[Tensor | None, ...]
    constants: tuple
    pointers: list[int]
    recording: _Recording | None

    @property
    def known(self) -> bool:
        return self.recording is not None

    def __call__(self):
        if self.recording is not None:
            return self.recording.replay(self.pointers, self.key[0])
        return self.replayed.record(self.key, self.tensors, self.constants)


class _CantReplay(Exception):
    pass


@dataclass(slots=True)
class _Launch:
    """One kernel: its arguments, and which of them are addresses: (position, number of the base
    pointer, bytes from there)."""

    run: Callable
    grid: tuple[int, int, int]
    function: object
    metadata: object
    args: list
    addresses: list[tuple[int, int, int]]


@dataclass(slots=True)
class _Recording:
    """The launches of a call. Base pointers are those of its tensors, then of its results, then
    the buffer's."""

    launches: list[_Launch]
    results: list[tuple[torch.Size, torch.dtype] | None]
    single: bool
    buffer: int
    device: torch.device

    @classmethod
    def of(cls, tensors, result, launches, allocations: _Allocations) -> _Recording:
        if allocations.other:
            raise _CantReplay(f"it also ran {', '.join(sorted(allocations.other))}")
        single = not isinstance(result, tuple)
        results = (result,) if single else result
        bases: dict[
            int, tuple[int, int]
        ] = {}  # storage -> (number of its pointer, bytes before it)
        given = [t for t in tensors if t is not None]
        for number, t in enumerate(tensors):
            if t is not None:
                bases.setdefault(_storage(t), (number, -_offset(t)))
        if len(bases) < len(given):
            raise _CantReplay("two of its tensors share their memory")
        for number, t in enumerate(results, len(tensors)):
            if t is None:
                continue
            if _storage(t) not in allocations.storages or not t.is_contiguous() or _offset(t):
                raise _CantReplay("a result is a view, or wasn't allocated by it")
            bases[_storage(t)] = (number, 0)
        end, last = 0, len(tensors) + len(results)
        for storage, size in allocations.storages.items():
            if storage not in bases:
                bases[storage] = (last, end)
                end += -(-size // 256) * 256
        known = [_known_launch(bases, *launch) for launch in launches]
        shapes = [None if t is None else (t.shape, t.dtype) for t in results]
        return cls(known, shapes, single, end, given[0].device)

    def replay(self, pointers: list[int], device: int):
        results: list[Tensor | None] = []
        for shape in self.results:
            if shape is None:
                results.append(None)
                pointers.append(0)
            else:
                t = torch.empty(shape[0], dtype=shape[1], device=self.device)
                results.append(t)
                pointers.append(t.data_ptr())
        if self.buffer:
            buffer = torch.empty(self.buffer, dtype=torch.uint8, device=self.device)
            pointers.append(buffer.data_ptr())
        stream = driver.active.get_current_stream(device)
        for launch in self.launches:
            args = launch.args.copy()
            for position, base, offset in launch.addresses:
                args[position] = pointers[base] + offset
            launch.run(
                *launch.grid, stream, launch.function, launch.metadata, None, None, None, *args
            )
        return results[0] if self.single else tuple(results)


def _known_launch(bases: dict, compiled, grid, names, args, meta) -> _Launch:
    values = [*args, *(meta.get(name) for name in names[len(args) :])]
    addresses = []
    for position, value in enumerate(values):
        if isinstance(value, Tensor):
            if value.numel() == 0:  # unused; Triton compiled for its pointer, which is aligned
                values[position] = 0
                continue
            if _storage(value) not in bases:
                raise _CantReplay("a kernel reads a tensor that is neither given nor allocated")
            number, before = bases[_storage(value)]
            addresses.append((position, number, before + _offset(value)))
            values[position] = 0
    grid = (*grid, 1, 1)[:3]
    return _Launch(
        compiled.run, grid, compiled.function, compiled.packed_metadata, values, addresses
    )


class _Allocations(TorchDispatchMode):
    """The storages allocated in its context, with their bytes, and what else ran."""

    FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}
        self.other: set[str] = set()
        self._kept: list[Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.FREE:
            self._kept.append(result)
            self.storages[_storage(result)] = result.untyped_storage().nbytes()
        elif not func.is_view:
            self.other.add(str(func))
        return result


_PLAIN = (Tensor, nn.Parameter)


def possible() -> bool:
    """Whether kernels are compiled, tensors are what they seem, and nobody watches what is done
    with them."""
    return not (
        _INTERPRETED
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or torch.is_autocast_enabled("cuda")
        or recording()
        or _has_hooks(knobs.runtime.launch_enter_hook)
        or _has_hooks(knobs.runtime.launch_exit_hook)
    )


def _has_hooks(chain) -> bool:
    """Of Triton's profilers: a chain of functions, maybe empty; in older releases one, or None."""
    return bool(getattr(chain, "calls", chain))


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _offset(t: Tensor) -> int:
    return int(t.storage_offset()) * t.element_size()
