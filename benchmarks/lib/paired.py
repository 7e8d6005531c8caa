"""What a few seeds say: means with confidence intervals, and differences, of pairs or not.

The intervals are Student's: of the mean of normally distributed values of unknown variance. With
the two or three seeds that are affordable they are wide, and that is their message.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student
from scipy.stats import ttest_ind


@dataclass(frozen=True)
class Estimate:
    """A mean of `count` values, their standard deviation, the half width of the mean's confidence
    interval, and the p-value of a mean of zero; all NaN for a single value."""

    mean: float
    deviation: float
    margin: float
    count: int
    p: float


def estimate(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Raises ValueError for no values."""
    count = len(values)
    if not count:
        raise ValueError("there are no values to take the mean of")
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.nan, math.nan, 1, math.nan)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1))
    quantile = float(student.ppf((1 + level) / 2, count - 1))
    error = deviation / math.sqrt(count)
    if error:
        p = float(2 * student.sf(abs(mean) / error, count - 1))
    else:
        p = float(mean == 0)
    return Estimate(mean, deviation, quantile * error, count, p)


def holm(estimates: Sequence[Estimate | None], level: float = 0.95) -> list[bool]:
    """Which of several means differ from zero, with at most 1 - level chance that any of those that
    don't is called so (Holm, "A simple sequentially rejective multiple test procedure", 1979). None
    and means of a single value don't count."""
    order = sorted(
        (e.p, i) for i, e in enumerate(estimates) if e is not None and not math.isnan(e.p)
    )
    found = [False] * len(estimates)
    for rank, (p, i) in enumerate(order):
        if p > (1 - level) / (len(order) - rank):
            break
        found[i] = True
    return found


def paired(
    values: Mapping[int, float], control: Mapping[int, float], level: float = 0.95
) -> Estimate | None:
    """Of value - control over the seeds that both have; None where there is none."""
    seeds = sorted(values.keys() & control.keys())
    return estimate([values[s] - control[s] for s in seeds], level) if seeds else None


def unpaired(
    values: Sequence[float], control: Sequence[float], level: float = 0.95
) -> Estimate | None:
    """Of the mean of the values less that of the control's, which may be others, of another number
    and variance (Welch); the deviation is NaN. None where one of them has less than two."""
    if min(len(values), len(control)) < 2:
        return None
    test = ttest_ind(values, control, equal_var=False)
    low, high = map(float, test.confidence_interval(level))
    count = len(values) + len(control)
    return Estimate((low + high) / 2, math.nan, (high - low) / 2, count, float(test.pvalue))
