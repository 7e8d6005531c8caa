"""A GPU that isn't there, with the rules of PyTorch 2.11 for streams, CUDA graphs and waiting.

Tensors lie on the CPU and say that they are on the GPU. A graph keeps the operators that ran while
it was captured, with their tensors, and a replay runs them again into the same memory.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
import warnings

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

READS = {"aten::_local_scalar_dense", "aten::nonzero"}


class FakeCuda:
    """The state of the GPUs, and what of `torch.cuda` changes it.

    tensors   the device that tensors say they are on
    device    the current one, by its number
    poisoned  whether a capture failed, which leaves random numbers and memory of PyTorch damaged
    captures  how many were begun; syncs: how many devices were waited for, as a whole
    """

    def __init__(self, monkeypatch, tensors: int = 1) -> None:
        self.tensors = torch.device("cuda", tensors)
        self.device, self.mode = 0, 0
        self.poisoned, self.capturing, self.valid = False, None, True
        self.captures = self.syncs = 0
        self._streams = threading.local()
        for name, value in {
            "Stream": lambda device=None: Stream(self, device),
            "CUDAGraph": lambda: Graph(self),
            "graph": lambda *args, **options: Capture(self, *args, **options),
            "stream": self.stream,
            "device": self.on_device,
            "current_stream": self.current_stream,
            "set_stream": self.set_stream,
            "synchronize": self.synchronize,
            "is_current_stream_capturing": lambda: self.capturing is not None,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": self.set_mode,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def set_mode(self, mode: str | int) -> None:
        self.mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)

    def number(self, device) -> int:
        return self.device if device is None else torch.device(device).index

    @contextlib.contextmanager
    def on_device(self, device):
        before, self.device = self.device, self.number(device)
        try:
            yield
        finally:
            self.device = before

    def current_stream(self, device=None) -> Stream:
        streams, number = self._streams.__dict__, self.number(device)
        return streams.setdefault(str(number), Stream(self, f"cuda:{number}"))

    def set_stream(self, stream: Stream) -> None:
        self._streams.__dict__[str(stream.device)] = stream

    @contextlib.contextmanager
    def stream(self, stream: Stream):
        before = self.current_stream(f"cuda:{stream.device}")
        self.set_stream(stream)
        try:
            yield
        finally:
            self.set_stream(before)

    def synchronize(self, device=None) -> None:
        assert self.capturing is None, "a device that captures can't be waited for"
        self.syncs += 1

    @contextlib.contextmanager
    def running(self):
        """What a thread that uses the GPU is in."""
        with Pretend(self), Driver(self):
            yield


class Stream:
    def __init__(self, gpu: FakeCuda, device=None) -> None:
        self.device, self.waited_for = gpu.number(device), []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


class Graph:
    def __init__(self, gpu: FakeCuda) -> None:
        self.gpu, self.tape, self.replays = gpu, None, 0

    def replay(self) -> None:
        assert self.gpu.device == self.gpu.tensors.index, "launched on another device"
        self.replays += 1
        for func, args, kwargs, made in self.tape:
            again = func(*args, **kwargs)
            for mine, its in zip(_list(made), _list(again), strict=True):
                if isinstance(mine, torch.Tensor) and mine is not its:
                    mine.copy_(its)


class Capture:
    """torch.cuda.graph of PyTorch 2.11: where the capture fails, its stream stays current."""

    def __init__(self, gpu: FakeCuda, graph: Graph, stream: Stream, capture_error_mode: str):
        self.gpu, self.graph, self.side = gpu, graph, stream
        assert capture_error_mode == "thread_local", "other threads would break it"

    def __enter__(self) -> None:
        gpu = self.gpu
        gpu.synchronize()
        assert self.side.device == gpu.device == gpu.tensors.index, "captured on another device"
        self.before = gpu.current_stream()
        gpu.set_stream(self.side)
        gpu.captures += 1
        gpu.capturing, gpu.valid, self.graph.tape = self.graph, True, []

    def __exit__(self, kind, *_) -> None:
        gpu, gpu.capturing = self.gpu, None
        if kind is not None or not gpu.valid:
            gpu.poisoned = True
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture"
            )
        gpu.set_stream(self.before)


class Pretend(TorchFunctionMode):
    def __init__(self, gpu: FakeCuda) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__:
            return self.gpu.tensors
        if func == torch.Tensor.is_cuda.__get__:
            return True
        return func(*args, **(kwargs or {}))


class Driver(TorchDispatchMode):
    """Sees every operator: records it, or refuses to."""

    def __init__(self, gpu: FakeCuda) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        gpu, kwargs = self.gpu, kwargs or {}
        if func.name() in READS:
            if gpu.capturing:
                gpu.valid = False
                raise RuntimeError("operation not permitted when stream is capturing")
            if gpu.mode == 2:
                raise RuntimeError("called a synchronizing CUDA operation")
            if gpu.mode == 1:
                frame = _caller()
                message = "called a synchronizing CUDA operation"
                warnings.warn_explicit(message, UserWarning, frame.filename, frame.lineno)
        made = func(*args, **kwargs)
        if gpu.capturing:
            # Tensors that are the same in two calls are the same memory.
            gpu.capturing.tape.append((func, args, tree_map_only(dict, dict, kwargs), made))
        return made


def _caller() -> traceback.FrameSummary:
    """The innermost frame that isn't PyTorch's, nor of this file."""
    frames = traceback.extract_stack()
    own = [f for f in frames if "/torch/" not in f.filename and f.filename != __file__]
    return own[-1]


def _list(made) -> list:
    return list(made) if isinstance(made, tuple | list) else [made]
