"""Means, intervals and paired differences against scipy's tests."""

import math

import numpy as np
import pytest
from helpers.seeds import fresh_rng
from lib.paired import Estimate, estimate, holm, paired, unpaired
from scipy import stats


def test_interval_of_a_known_case():
    # 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.3027
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.deviation, found.count) == (2.0, 1.0, 3)
    assert found.margin == pytest.approx(4.302652729911275 / math.sqrt(3))


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_agrees_with_scipy(level):
    rng = fresh_rng()
    values = rng.normal(rng.normal(), 3, size=int(rng.integers(2, 12))).tolist()
    found = estimate(values, level)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(level)
    assert found.mean - found.margin == pytest.approx(low)
    assert found.mean + found.margin == pytest.approx(high)
    assert found.deviation == pytest.approx(np.std(values, ddof=1))
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


def test_pairs_are_those_of_the_same_seed_as_in_scipys_paired_test():
    rng = fresh_rng()
    control = {seed: float(rng.normal(50, 5)) for seed in range(6)}
    values = {seed: control[seed] + float(rng.normal(1, 0.3)) for seed in (5, 3, 1, 4)}
    found = paired(values | {9: 1e6}, control)
    pairs = [list(map(column.get, (1, 3, 4, 5))) for column in (values, control)]
    low, high = stats.ttest_rel(*pairs).confidence_interval()
    assert found.count == 4
    assert found.mean == pytest.approx(np.mean(pairs[0]) - np.mean(pairs[1]))
    assert found.mean - found.margin == pytest.approx(low)
    assert found.mean + found.margin == pytest.approx(high)
    # what seeds share cancels: the interval is far narrower than an unpaired one
    shifted = {seed: value + 1000 * seed for seed, value in values.items()}
    base = {seed: value + 1000 * seed for seed, value in control.items()}
    assert paired(shifted, base).margin == pytest.approx(found.margin, abs=1e-6)


def test_one_value_has_no_interval_and_no_values_are_an_error():
    found = estimate([7.0])
    assert found.mean == 7.0 and math.isnan(found.margin) and math.isnan(found.deviation)
    assert math.isnan(found.p)
    assert paired({0: 1.0}, {1: 1.0}) is None
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_equal_values_have_an_interval_of_no_width():
    assert estimate([2.0] * 3).margin == 0 and estimate([2.0] * 3).p == 0
    assert estimate([0.0] * 3).p == 1


def test_holm_by_its_adjusted_p_values():
    """The largest of (m - j) p_j over the j smallest, which is compared with the level itself."""
    rng = fresh_rng()
    ps = (10 ** rng.uniform(-4, 0, 9)).tolist()
    estimates = [Estimate(1.0, 1.0, 1.0, 3, p) for p in ps]
    adjusted = [max((len(ps) - j) * q for j, q in enumerate(sorted(ps)) if q <= p) for p in ps]
    for level in (0.5, 0.9, 0.95):
        assert holm(estimates, level) == [p <= 1 - level for p in adjusted]
    alone = Estimate(1.0, math.nan, math.nan, 1, math.nan)
    assert holm([None, alone, Estimate(1.0, 1.0, 1.0, 3, 0.04)]) == [False, False, True]
    assert holm([]) == []


def test_unpaired_values_of_another_number_and_variance_as_in_welchs_test():
    rng = fresh_rng()
    values, control = rng.normal(5, 3, size=9).tolist(), rng.normal(4, 1, size=5).tolist()
    found = unpaired(values, control, 0.9)
    low, high = stats.ttest_ind(values, control, equal_var=False).confidence_interval(0.9)
    assert found.mean == pytest.approx(np.mean(values) - np.mean(control))
    assert (found.mean - found.margin, found.mean + found.margin) == pytest.approx((low, high))
    assert found.count == 14 and 0 < found.p < 1
    assert unpaired([1.0], control) is None
