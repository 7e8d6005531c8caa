"""Runs a function of tensors compiled, or from CUDA graphs, and falls back to calling it."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from dynamic_dino_kernels.capture import capture
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..modeling.structures import Detections, TextFeatures
from ..moe.routing import Routing

logger = logging.getLogger(__name__)

# On import, once for the process: PyTorch then sees the tensors inside these dataclasses.
for structure in (TextFeatures, Detections, Routing):
    torch.export.register_dataclass(
        structure, serialized_type_name=f"dynamic_dino.{structure.__name__}"
    )

MODES = ("eager", "compile", "graph")
REMEDIES = {
    "compile": "torch.compile needs a C++ compiler for a CPU, and for CUDA a C compiler and "
    "Python's headers; accelerate='eager' does without",
    "graph": "a CUDA graph can't record what makes the host wait, as the experts' back-ends "
    "'grouped' and 'sequential' do: if they run although Triton should, the log says why; "
    "accelerate='eager' does without graphs",
}


def accelerate(function: Callable, mode: str) -> Callable:
    """`function`, of tensors in tuples, lists, dicts and our structures, run in one of these modes:

    - ``eager``: as it is.
    - ``compile``: by torch.compile, once for every combination of shapes.
    - ``graph``: on CUDA, captured once for every combination of shapes, then replayed: Python and
      launches cost nothing any more. On a CPU, as it is.

    If compiling or capturing fails, that is logged once, and the function is called as it is; see
    `mode_of` for what became of it.

    Raises:
        ValueError: `mode` is none of these.
    """
    if mode not in MODES:
        raise ValueError(f"accelerate={mode!r}: choose one of {', '.join(MODES)}")
    if mode == "eager":
        return function
    fast = torch.compile(function, dynamic=False) if mode == "compile" else CudaGraphs(function)
    return WithFallback(function, fast, mode)


def mode_of(function: Callable) -> str:
    """How the last call of what `accelerate` returned really ran: one of `MODES`."""
    return getattr(function, "ran", "eager")


class WithFallback:
    """Calls `fast` until it fails where `function` doesn't, from then on `function`.

    ran: how the last call was run, one of `MODES`.
    """

    def __init__(self, function: Callable, fast: Callable, mode: str) -> None:
        self.function, self.fast, self.mode = function, fast, mode
        self.ran = "eager"

    def __call__(self, *args):
        fast, reason = self.fast, None
        if fast is not None:
            try:
                result = fast(*args)
                self.ran = getattr(fast, "ran", self.mode)
                return result
            except Exception as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        result = self.function(*args)  # if the arguments are at fault, this raises
        self.ran = "eager"
        if reason is not None:
            self.fast = None
            name = getattr(self.function, "__qualname__", type(self.function).__name__)
            logger.warning(
                "accelerate=%r failed, so %s runs without from now on, more slowly: %s (%s)",
                *(self.mode, name, reason, REMEDIES[self.mode]),
            )
        return result


class CudaGraphs:
    """A function of CUDA tensors, and of constants, as one graph for every combination of shapes.

    At most `most` graphs are kept, each with its memory; the one that was used least recently makes
    place for a new one. The function itself is called for tensors on other devices or on several,
    for gradients, and while somebody else captures. Threads take turns.

    ran: "graph" or "eager", how the last call was run.
    """

    def __init__(self, function: Callable, most: int = 16) -> None:
        self.function, self.most = function, most
        self.ran = "eager"
        self._graphs: OrderedDict[tuple, _Captured] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *args):
        flat, spec = tree_flatten(args)
        given = [leaf for leaf in flat if isinstance(leaf, Tensor)]
        devices = {t.device for t in given}
        if len(devices) != 1 or not given[0].is_cuda or _unfit(given):
            self.ran = "eager"
            return self.function(*args)
        (device,) = devices
        key = (str(spec), device, *map(_kind, flat))
        with self._lock, torch.cuda.device(device):
            captured = self._graphs.get(key)
            if captured is None:
                self._make_room(device)
                captured = self._graphs[key] = _Captured.of(self.function, flat, spec, device)
            self._graphs.move_to_end(key)
            result = captured(given)
        self.ran = "graph"
        return result

    def _make_room(self, device: torch.device) -> None:
        if len(self._graphs) < self.most:
            return
        torch.cuda.synchronize(device)  # it may still run
        self._graphs.popitem(last=False)
        logger.warning(
            "more than %d combinations of shapes are in use: the CUDA graph that was used least "
            "recently is dropped, and captured anew when it is needed, which takes a moment; fewer "
            "image sizes or lengths of prompts avoid that",
            self.most,
        )


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: object
    stream: torch.cuda.Stream  # of the last call

    @classmethod
    def of(cls, function: Callable, flat: list, spec, device: torch.device) -> _Captured:
        # Normal tensors, whatever mode this is in: those of inference mode could only be written
        # to in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            static = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in flat]
            args = tree_unflatten(static, spec)
            graph, outputs = capture(lambda: function(*args), device)
        inputs = [leaf for leaf in static if isinstance(leaf, Tensor)]
        return cls(graph, inputs, outputs, torch.cuda.current_stream(device))

    def __call__(self, given: list[Tensor]):
        stream = torch.cuda.current_stream(given[0].device)
        if stream != self.stream:  # of another thread, which may not have read its results yet
            stream.wait_stream(self.stream)
            self.stream = stream
        for mine, its in zip(self.inputs, given, strict=True):
            mine.copy_(its)
        self.graph.replay()
        # The next replay writes to the same memory: what leaves must be a copy.
        return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, self.outputs)


def _kind(leaf: object) -> Hashable:
    """A leaf's part of a graph's key: shape, type and strides of a tensor, else the value."""
    return (leaf.shape, leaf.dtype, leaf.stride()) if isinstance(leaf, Tensor) else leaf


def _unfit(tensors: list[Tensor]) -> bool:
    """Whether no graph can be captured: gradients are wanted, or another capture is going on."""
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return wanted or torch.cuda.is_current_stream_capturing()
