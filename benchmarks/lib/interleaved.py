"""How all benchmarks measure: timing is interleaved, so that a slow moment hits all candidates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Name = TypeVar("Name")
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def timed(
    step: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of `clock` from the call until the results are there."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def interleave(steps: dict[Name, Callable[[], float]], repeats: int) -> dict[Name, list[float]]:
    """What each of the functions returned, seconds, in `repeats` rounds."""
    times: dict[Name, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(step())
    return times


def quartiles(seconds: Sequence[float], unit: str = "ms") -> dict[str, float]:
    """{"median_ms", "low_ms", "high_ms"}, or the same in "us"."""
    factor = {"ms": 1e3, "us": 1e6}[unit]
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        f"median_{unit}": median * factor,
        f"low_{unit}": low * factor,
        f"high_{unit}": high * factor,
    }
