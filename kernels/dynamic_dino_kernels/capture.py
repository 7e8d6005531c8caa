"""CUDA graphs of functions, without a capture that fails.

One that does leaves PyTorch 2.11 damaged: the current stream stays that of the capture, and random
numbers and memory as if it went on. So a function is first run while nothing may wait for the GPU,
which is what mostly can't be captured.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, TypeVar

import torch

Result = TypeVar("Result")

WAITS = "called a synchronizing CUDA operation"  # PyTorch's words
# PyTorch can't do two captures at once; one may be made in the first calls of another's `step`.
_one_at_a_time = threading.RLock()


def capture(
    step: Callable[[], Result], device: torch.device | str | None = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """The graph of `step` on a device (None: the current one), and what `step` returned: tensors
    that each replay writes anew.

    `step` runs three times before it is captured: kernels are compiled, and caches filled.

    Raises:
        RuntimeError: `step` waits for the GPU or can't be captured for another reason; the message
            says where, or why. The current stream is what it was.
    """
    with _one_at_a_time, torch.cuda.device(device):
        side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                for _ in range(2):
                    step()
                with waiting_forbidden():
                    step()
        finally:
            current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # What other threads do meanwhile is none of this capture's business.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                result = step()
        except BaseException:
            torch.cuda.set_stream(current)
            raise
        return graph, result


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    """In this context it is an error if this thread waits for the GPU, as far as PyTorch tells.

    PyTorch's debug mode "error" would do, were it not for all threads: those that read their
    results at this time would fail. Its warnings are raised in the thread that caused them.

    Raises:
        RuntimeError: naming the line that waits.
    """
    thread, before = threading.get_ident(), torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if WAITS not in str(message):
                others(message, category, filename, lineno, file, line)
            elif threading.get_ident() == thread:
                raise RuntimeError(f"line {lineno} of {Path(filename).name} waits for the GPU")

        warnings.showwarning = show
        warnings.filterwarnings("always", WAITS)
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
