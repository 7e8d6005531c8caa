"""How much of a scene's kind its routing tells: mutual information, chance, and accuracy.

Everything is counted by image: `choices` float [N, C] is how often each of N images took each of C
choices (a route: once; experts: as often as its queries took them), `kinds` int [N] is which of G
sets each image is from. Logarithms are natural; what is returned is normalised.
"""

from __future__ import annotations

import numpy as np

FOLDS = 5


def table(choices: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """float [G, C]: how often the images of each set took each choice"""
    return one_hot(kinds).T @ choices


def normalised_information(counts: np.ndarray) -> float:
    """2 I / (H_rows + H_columns) of a table of counts: 0 if rows and columns are independent, 1 if
    either tells the other. 0 where one of them has a single value."""
    joint = counts / counts.sum()
    rows, columns = entropy(joint.sum(1)), entropy(joint.sum(0))
    information = rows + columns - entropy(joint.ravel())
    return float(2 * information / (rows + columns)) if min(rows, columns) > 1e-12 else 0.0


def information_by_chance(
    choices: np.ndarray, kinds: np.ndarray, times: int, rng: np.random.Generator
) -> np.ndarray:
    """float [times]: `normalised_information` with the sets permuted over the images. An image
    keeps its choices together: its queries aren't independent of each other."""
    shuffled = (rng.permutation(kinds) for _ in range(times))
    return np.array([normalised_information(table(choices, found)) for found in shuffled])


def told_apart(patterns: np.ndarray, kinds: np.ndarray, rng: np.random.Generator) -> float:
    """The share of images whose set is that of most images, of other folds, with the same pattern.

    Sets that are equally frequent share the point, and so do all where no other image has the
    pattern; the folds have as many images of each set as they can, so that patterns that tell
    nothing give 1 / G where sets are of one size.

    Args:
        patterns: int [N, ...], what is known of each image.
    """
    _, pattern = np.unique(patterns.reshape(len(kinds), -1), axis=0, return_inverse=True)
    seen, of_set = one_hot(pattern), one_hot(kinds)
    fold, right = folds(kinds, rng), 0.0
    for held_out in range(FOLDS):
        test = fold == held_out
        votes = seen[~test].T @ of_set[~test]  # [patterns, G]
        best = votes == votes.max(1, keepdims=True)
        points = best / best.sum(1, keepdims=True)
        right += points[pattern[test], kinds[test]].sum()
    return float(right / len(kinds))


def told_by_features(features: np.ndarray, kinds: np.ndarray, rng: np.random.Generator) -> float:
    """`told_apart` from features float [N, D]: the set whose mean, of other folds, is the nearest,
    each feature divided by its standard deviation within sets."""
    fold, right = folds(kinds, rng), 0
    of_set = one_hot(kinds)
    for held_out in range(FOLDS):
        test = fold == held_out
        x, member = features[~test], of_set[~test]
        means = member.T @ x / member.sum(0)[:, None]
        scale = (x - means[kinds[~test]]).std(0) + 1e-12
        distances = (((features[test][:, None] - means) / scale) ** 2).sum(-1)
        right += (distances.argmin(1) == kinds[test]).sum()
    return float(right / len(kinds))


def common_share(features: np.ndarray) -> float:
    """The share of the features' mean square, float [N, D], that all images have in common: 1 if
    they are all the same, 0 if their mean is zero."""
    return float((features.mean(0) ** 2).sum() / (features**2).sum(1).mean())


def folds(kinds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int [N]: each set's images in a random order, dealt to the folds in turn"""
    fold = np.empty(len(kinds), int)
    for kind in np.unique(kinds):
        rows = rng.permutation(np.flatnonzero(kinds == kind))
        fold[rows] = np.arange(len(rows)) % FOLDS
    return fold


def one_hot(values: np.ndarray) -> np.ndarray:
    """int [N] -> float [N, largest + 1]"""
    return np.eye(int(values.max()) + 1)[values]


def entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())
