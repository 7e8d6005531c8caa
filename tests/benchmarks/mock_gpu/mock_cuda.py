"""A pretended GPU, so that a script for one can be run whole where there is none.

All tensors say that they are on cuda:0 and lie on the CPU; Triton's interpreter runs the kernels.
A graph keeps the operators and kernels that ran during its capture, and runs them again at each
replay, on the same memory. A capture follows the rules of PyTorch 2.11: what waits for the GPU
makes it fail, and a failed one leaves the capture's stream current and the random generator
unusable until the next capture that succeeds.

What it can't show: copies between host and device (there is one memory), races, types that Triton's
interpreter gets wrong (bfloat16), and anything about time.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
import types

os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel is defined

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

NAME = "NVIDIA H100 (pretended)"
CAPABILITY = (9, 0)
PROPERTIES = types.SimpleNamespace(
    name=NAME,
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    warp_size=32,
    L2_cache_size=50 << 20,
    total_memory=80 << 30,
)
# Functions that wait for the GPU, by name.
WAITING = {
    *("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"),
    *("nonzero", "argwhere", "unique", "unique_consecutive", "bincount", "masked_select"),
    *("equal", "allclose", "is_nonzero"),
}
RANDOM = {"rand", "randn", "randint", "randperm", "normal"}  # given a device
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


class State:
    """What a CUDA context knows."""

    def __init__(self) -> None:
        self.capture: Recorder | None = None
        self.failed = False  # the capture under way
        self.poisoned = False  # by a capture that failed
        self.sync_debug = 0
        self.streams = [Stream()]

    def wait(self, name: str) -> None:
        """What waits for the GPU goes through here."""
        if self.capture is not None:
            self.failed = True
            raise torch.AcceleratorError(
                f"CUDA error: operation not permitted when stream is capturing ({name})"
            )
        if self.sync_debug == 2:
            raise RuntimeError(f"called a synchronizing CUDA operation ({name})")


class Stream:
    def __init__(self, device=None, priority=0, **_) -> None:
        self.device, self.cuda_stream = CUDA, id(self)

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        state.wait("Stream.synchronize")


class Event:
    def __init__(self, enable_timing=False, **_) -> None:
        self.timed, self.when = enable_timing, None

    def record(self, stream=None) -> None:
        self.when = time.perf_counter()

    def wait(self, stream=None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        state.wait("Event.synchronize")

    def elapsed_time(self, end: Event) -> float:
        if not (self.timed and end.timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        return max(1e-6, (end.when - self.when) * 1e3)


class Recorder(TorchDispatchMode):
    """Keeps what runs, as functions that run it again on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # importing it takes seconds, and nothing is compiled here

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)

        def again() -> None:
            new = function(*args, **kwargs)
            for old, fresh in zip(tree_leaves(result), tree_leaves(new), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != fresh.data_ptr():
                    old.copy_(fresh)

        self.calls.append(again)
        return result


class CUDAGraph:
    def __init__(self, keep_graph: bool = False) -> None:
        self.calls = None

    def capture_begin(self, pool=None, capture_error_mode="global") -> None:
        if state.capture is not None:
            raise RuntimeError("a graph is being captured already")
        state.capture, state.failed = Recorder(), False
        state.capture.__enter__()

    def capture_end(self) -> None:
        recorder, state.capture = state.capture, None
        recorder.__exit__(None, None, None)
        if state.failed:
            state.poisoned = True
            raise torch.AcceleratorError(
                "CUDA error: operation failed due to a previous error during capture"
            )
        state.poisoned = False
        self.calls = recorder.calls

    def replay(self) -> None:
        if self.calls is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        with torch.no_grad(), Silence():
            for call in self.calls:
                call()

    def reset(self) -> None:
        self.calls = None

    def pool(self) -> tuple[int, int]:
        return (0, id(self))


class graph:  # noqa: N801, as PyTorch calls it
    """torch.cuda.graph of PyTorch 2.11, which doesn't tidy up after a capture that failed."""

    def __init__(self, cuda_graph, pool=None, stream=None, capture_error_mode="global") -> None:
        self.cuda_graph, self.stream = cuda_graph, stream or Stream()

    def __enter__(self) -> None:
        state.wait("synchronize")
        state.streams.append(self.stream)
        self.cuda_graph.capture_begin()

    def __exit__(self, *exception) -> None:
        self.cuda_graph.capture_end()  # where it raises, the stream stays
        state.streams.pop()


@contextlib.contextmanager
def stream(wanted: Stream | None):
    state.streams.append(wanted or state.streams[-1])
    before = len(state.streams)
    try:
        yield
    finally:
        del state.streams[before - 1 :]


def set_stream(wanted: Stream) -> None:
    state.streams[-1] = wanted


def set_sync_debug_mode(mode: int | str) -> None:
    state.sync_debug = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)


class device(contextlib.nullcontext):  # noqa: N801
    """torch.cuda.device; there is one."""

    def __init__(self, wanted) -> None:
        super().__init__()
        self.idx = 0


class Silence(TorchFunctionMode):
    """What is replayed is not looked at again."""

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            return function(*args, **(kwargs or {}))


def on_cpu(value):
    """A device that a function is given, where the tensor really goes."""
    named = isinstance(value, str) and (value == "cuda" or value.startswith("cuda:"))
    if named or (isinstance(value, torch.device) and value.type == "cuda"):
        return CPU
    return value


def waits(name: str, args: tuple, kwargs: dict) -> bool:
    if name in WAITING:
        return True
    if name == "where":
        return len(args) + len(kwargs) == 1
    if name == "repeat_interleave":
        sized = kwargs.get("output_size") is not None
        return not sized and any(isinstance(a, torch.Tensor) for a in args[1:])
    if name in ("tensor", "as_tensor", "from_numpy"):  # copied from the host, which waits
        return state.capture is not None
    if name in ("grouped_mm", "_grouped_mm"):  # looks at offsets on the host
        return CAPABILITY < (9, 0)
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(
            isinstance(i, list) or (isinstance(i, torch.Tensor) and i.dtype == torch.bool)
            for i in index
        )
    return False


def is_probe(tensor: torch.Tensor) -> bool:
    """torch.tensor([]): by its device transformers tells which one is the default."""
    return getattr(tensor, "probe", False)


class Pretending(TorchFunctionMode):
    """Lets every function of tensors see a GPU."""

    ANSWERS = {
        torch.Tensor.device.__get__: lambda t: t.device if t.is_meta or is_probe(t) else CUDA,
        torch.Tensor.is_cuda.__get__: lambda t: not t.is_meta,
        torch.Tensor.is_cpu.__get__: lambda t: False,
        torch.Tensor.get_device: lambda t: 0,
        torch.Tensor.cuda: lambda t, *args, **kwargs: t,
        torch.Tensor.pin_memory: lambda t, *args: t,
        torch.Tensor.is_pinned: lambda t, *args: True,
    }

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (answer := self.ANSWERS.get(function)) is not None:
            return answer(*args, **kwargs)
        if function is torch.device:
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if waits(name, args, kwargs):
            state.wait(name)
        if state.poisoned and state.capture is None and name in RANDOM:
            if on_cpu(kwargs.get("device")) is not kwargs.get("device"):
                raise RuntimeError(
                    "Offset increment outside graph capture encountered unexpectedly."
                )
        result = function(
            *(on_cpu(a) for a in args), **{key: on_cpu(value) for key, value in kwargs.items()}
        )
        if name == "tensor" and args == ([],) and not kwargs:
            result.probe = True
        return result


def kernels_are_recorded() -> None:
    """A kernel that is launched outside an operator belongs to a graph as well."""
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__

    @functools.wraps(launch)
    def recorded(self, *args, **kwargs):
        if state.capture is None or not torch.utils._python_dispatch._get_current_dispatch_mode():
            return launch(self, *args, **kwargs)
        state.capture.calls.append(lambda: launch(self, *args, **kwargs))
        with _disable_current_modes():
            return launch(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = recorded


class profile(torch.profiler.profile):  # noqa: N801
    """torch.profiler.profile; of a GPU's kernels it sees none, as where CUPTI is missing."""

    def __init__(self, *, activities=None, **options) -> None:
        super().__init__(activities=[torch.profiler.ProfilerActivity.CPU], **options)


def replace(owner, **attributes) -> None:
    for name, value in attributes.items():
        setattr(owner, name, value)


def install() -> None:
    """For good, in this thread and process."""
    global state
    state = State()
    allocated = 1 << 20
    replace(
        torch.cuda,
        **{name: globals()[name] for name in ("Stream", "Event", "CUDAGraph", "graph", "stream")},
        **{name: globals()[name] for name in ("set_stream", "set_sync_debug_mode", "device")},
        is_available=lambda: True,
        is_initialized=lambda: True,
        init=lambda: None,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda wanted: None,
        get_device_name=lambda wanted=None: NAME,
        get_device_capability=lambda wanted=None: CAPABILITY,
        get_device_properties=lambda wanted=None: PROPERTIES,
        get_sync_debug_mode=lambda: state.sync_debug,
        current_stream=lambda wanted=None: state.streams[-1],
        default_stream=lambda wanted=None: state.streams[0],
        is_current_stream_capturing=lambda: state.capture is not None,
        synchronize=lambda wanted=None: state.wait("synchronize"),
        is_bf16_supported=lambda *args, **kwargs: True,
        memory_allocated=lambda wanted=None: allocated,
        max_memory_allocated=lambda wanted=None: 2 * allocated,
        reset_peak_memory_stats=lambda wanted=None: None,
        mem_get_info=lambda wanted=None: (PROPERTIES.total_memory, PROPERTIES.total_memory),
        empty_cache=lambda: None,
        manual_seed=lambda seed: None,
        manual_seed_all=lambda seed: None,
    )
    default = torch.set_default_device
    torch.set_default_device = lambda wanted: default(on_cpu(wanted))
    load = torch.load
    torch.load = lambda *args, map_location=None, **kwargs: load(
        *args, map_location=on_cpu(map_location), **kwargs
    )
    torch.profiler.profile = profile
    kernels_are_recorded()
    Pretending().__enter__()
