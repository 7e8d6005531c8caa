"""Which experts work together: co-selection of one MoE layer (Dynamic-DINO, Figures 8 and 14).

The paper shows normalised co-selection frequencies and doesn't say what they are normalised by.
Here a row is what its expert shares its tokens with: it adds up to one.
"""

from __future__ import annotations

import numpy as np


def partner_shares(pairs: np.ndarray) -> np.ndarray:
    """int [E, E], `LayerCounts.pairs` -> float [E, E]: of the times that expert i had a partner, in
    which share it was j; rows of experts without any are zero."""
    return pairs / pairs.sum(1, keepdims=True).clip(1)


def effective_partners(pairs: np.ndarray) -> np.ndarray:
    """float [E]: exp of the entropy of a row of `partner_shares`, n where an expert works equally
    often with n others; 0 where it has no partner."""
    shares = partner_shares(pairs)
    logs = np.log(np.where(shares > 0, shares, 1))
    return np.where(shares.sum(1) > 0, np.exp(-(shares * logs).sum(1)), 0)


def concentration(pairs: np.ndarray) -> dict[str, float]:
    """Of one layer: "partners", the mean of `effective_partners`; "top_1" and "top_2", the share of
    its co-selections that an expert has with its one or two most frequent partners. Weighted by how
    often the experts have partners; zeros where tokens take single experts."""
    weight = pairs.sum(1) / max(pairs.sum(), 1)
    best = np.sort(partner_shares(pairs), 1)[:, ::-1]
    return {
        "partners": float(weight @ effective_partners(pairs)),
        "top_1": float(weight @ best[:, 0]),
        "top_2": float(weight @ best[:, :2].sum(1)),
    }


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r between the numbers of tokens that two data sets give to each pair of experts;
    nan where one of them gives every pair the same."""
    upper = np.triu_indices(len(a), 1)
    a, b = (pairs[upper] - pairs[upper].mean() for pairs in (a.astype(float), b.astype(float)))
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else float("nan")
