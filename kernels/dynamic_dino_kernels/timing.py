"""Time on a GPU: events around the replay of a CUDA graph, so that Python's share stays out."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .capture import capture


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """A function that replays `step` from a CUDA graph, after a warm-up that compiles kernels.

    Raises:
        RuntimeError: `step` can't be captured, see `capture`.
    """
    return capture(step)[0].replay


def seconds(step: Callable[[], None]) -> float:
    """How long the GPU is busy with `step`, or waits for it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
