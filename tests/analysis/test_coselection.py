"""Co-selection against loops, and on matrices whose numbers are known."""

import math

import numpy as np
import pytest
from dynamic_dino.analysis.coselection import (
    concentration,
    correlation,
    effective_partners,
    partner_shares,
)


def random_pairs(rng, experts=6):
    pairs = np.triu(rng.integers(0, 20, (experts, experts)), 1)
    return pairs + pairs.T


def test_against_loops(rng):
    pairs = random_pairs(rng)
    pairs[2], pairs[:, 2] = 0, 0  # an expert that always works alone
    shares, partners = partner_shares(pairs), effective_partners(pairs)
    weighted = top_1 = top_2 = 0.0
    for i in range(6):
        total = sum(pairs[i])
        row = [p / total if total else 0 for p in pairs[i]]
        assert shares[i] == pytest.approx(row)
        expected = math.exp(-sum(p * math.log(p) for p in row if p)) if total else 0
        assert partners[i] == pytest.approx(expected)
        weight = total / pairs.sum()
        weighted += weight * expected
        top_1 += weight * max(row)
        top_2 += weight * sum(sorted(row)[-2:])
    expected = {"partners": weighted, "top_1": top_1, "top_2": top_2}
    assert concentration(pairs) == pytest.approx(expected)


def test_known_cases():
    siblings = np.kron(np.eye(4, dtype=int), np.array([[0, 5], [5, 0]]))
    assert concentration(siblings) == pytest.approx({"partners": 1, "top_1": 1, "top_2": 1})
    even = 3 - 3 * np.eye(5, dtype=int)
    assert concentration(even) == pytest.approx({"partners": 4, "top_1": 0.25, "top_2": 0.5})
    alone = np.zeros((4, 4), int)
    assert concentration(alone) == {"partners": 0, "top_1": 0, "top_2": 0}


def test_correlation_is_that_of_the_pairs(rng):
    a, b = random_pairs(rng), random_pairs(rng)
    cells = [(a[i, j], b[i, j]) for i in range(6) for j in range(i)]
    assert correlation(a, b) == pytest.approx(np.corrcoef(np.array(cells).T)[0, 1])
    assert correlation(a, 7 * a) == pytest.approx(1)
    assert math.isnan(correlation(a, np.ones((6, 6), int)))
