"""Runs a function of tensors compiled, or from CUDA graphs, and falls back to calling it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .moe.routing import Routing
from .postprocess import Detections
from .structures import TextFeatures

logger = logging.getLogger(__name__)

for structure in (TextFeatures, Detections, Routing):  # so that their tensors are seen
    torch.export.register_dataclass(
        structure, serialized_type_name=f"dynamic_dino.{structure.__name__}"
    )

WAYS = ("eager", "compile", "graph")


def accelerate(function: Callable, way: str) -> Callable:
    """`function`, of tensors in tuples, lists, dicts and our structures, run in one of these ways:

    - ``eager``: as it is.
    - ``compile``: by torch.compile, once for every combination of shapes.
    - ``graph``: on CUDA, captured once for every combination of shapes, then replayed: Python and
      launches cost nothing any more. On a CPU, as it is.

    If compiling or capturing fails, that is logged once, and the function is called as it is.

    Raises:
        ValueError: `way` is none of these.
    """
    if way not in WAYS:
        raise ValueError(f"accelerate={way!r}: choose one of {', '.join(WAYS)}")
    if way == "eager":
        return function
    fast = torch.compile(function, dynamic=False) if way == "compile" else CudaGraphs(function)
    return WithFallback(function, fast, way)


class WithFallback:
    """Calls `fast` until it fails, from then on `function`."""

    def __init__(self, function: Callable, fast: Callable, way: str) -> None:
        self.function, self.fast, self.way = function, fast, way

    def __call__(self, *args):
        if self.fast is not None:
            try:
                return self.fast(*args)
            except Exception as error:
                reason = str(error).strip().splitlines() or [type(error).__name__]
                logger.warning("accelerate=%r failed, going on without: %s", self.way, reason[0])
                self.fast = None
        return self.function(*args)


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: object


class CudaGraphs:
    """A function of CUDA tensors as one graph for every combination of shapes.

    At most `most` graphs are kept, each with its memory; what comes beyond them, and tensors on
    other devices, are passed to the function itself.
    """

    def __init__(self, function: Callable, most: int = 16) -> None:
        self.function, self.most = function, most
        self._graphs: dict[tuple, _Captured] = {}

    def __call__(self, *args):
        flat, spec = tree_flatten(args)
        if not all(isinstance(t, Tensor) and t.is_cuda for t in flat):
            return self.function(*args)
        key = (str(spec), *((t.shape, t.dtype, t.stride()) for t in flat))
        if key not in self._graphs:
            if len(self._graphs) == self.most:
                return self.function(*args)
            self._graphs[key] = self._capture(flat, spec)
        captured = self._graphs[key]
        for mine, given in zip(captured.inputs, flat, strict=True):
            mine.copy_(given)
        captured.graph.replay()
        # The next replay writes to the same memory: what leaves must be a copy.
        return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, captured.outputs)

    def _capture(self, flat: list[Tensor], spec) -> _Captured:
        inputs = [t.clone() for t in flat]
        args = tree_unflatten(inputs, spec)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles kernels and fills caches, which can't be captured
            for _ in range(2):
                self.function(*args)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.function(*args)
        return _Captured(graph, inputs, outputs)
