"""Which combination of experts the objects of a class go to ("refrigerator: 0, 3")."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from .collect import Collection
from .objects import Objects

FITS = 0.5  # IoU from which a query is on an object


@dataclass
class Preference:
    """Of the objects of a class, `share` are of queries that took these `experts`, which is `lift`
    times the share of all objects."""

    name: str
    objects: int
    experts: tuple[int, ...]
    share: float
    lift: float


def combination(ids: np.ndarray) -> tuple[int, ...]:
    """A row of `Collection.experts` without its empty slots."""
    return tuple(int(i) for i in ids if i >= 0)


def label(experts: tuple[int, ...]) -> str:
    return ", ".join(map(str, experts)) if experts else "none"


def object_combinations(
    collection: Collection, objects: Objects, layer: int
) -> list[tuple[int, tuple[int, ...]]]:
    """(category id, experts) of every object that a query is on, in a MoE layer of the decoder."""
    ids = objects.category_ids.tolist()
    return [
        (ids[i], combination(collection.experts[objects.owner[i], layer]))
        for i in np.flatnonzero(objects.iou >= FITS)
    ]


def preferences(
    pairs: list[tuple[int, tuple[int, ...]]], names: dict[int, str], least: int = 3
) -> list[Preference]:
    """The most frequent combination of each class with at least `least` objects, the strongest
    preferences (share, then objects) first."""
    everything = Counter(experts for _, experts in pairs)
    of_class: dict[int, Counter] = {}
    for category, experts in pairs:
        of_class.setdefault(category, Counter())[experts] += 1
    result = []
    for category, counts in of_class.items():
        total = sum(counts.values())
        if total < least:
            continue
        experts, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
        lift = count / total / (everything[experts] / len(pairs))
        result.append(Preference(names[category], total, experts, count / total, lift))
    return sorted(result, key=lambda p: (-p.share, -p.objects, p.name))


def information(pairs: list[tuple[int, tuple[int, ...]]]) -> float:
    """How much of the choice of experts the class tells: I(class; experts) / H(experts), 0 to 1.

    Few objects tell something by chance: compare with `information` of shuffled classes.
    """
    if not pairs:
        return 0.0
    joint = _entropy(Counter(pairs))
    classes = _entropy(Counter(category for category, _ in pairs))
    experts = _entropy(Counter(chosen for _, chosen in pairs))
    return (classes + experts - joint) / experts if experts > 0 else 0.0


def chance_information(pairs: list[tuple[int, tuple[int, ...]]], seed: int = 0) -> float:
    """Mean of `information` over 20 shuffles of the classes."""
    rng = np.random.default_rng(seed)
    classes = np.array([category for category, _ in pairs])
    experts = [chosen for _, chosen in pairs]
    shuffled = (rng.permutation(classes).tolist() for _ in range(20))
    return float(np.mean([information(list(zip(s, experts, strict=True))) for s in shuffled]))


def class_expert_shares(
    pairs: list[tuple[int, tuple[int, ...]]], num_experts: int, classes: list[int]
) -> np.ndarray:
    """float [C, E]: of the experts that the objects of a class took, the share of each."""
    row = {category: i for i, category in enumerate(classes)}
    counts = np.zeros((len(classes), num_experts))
    for category, experts in pairs:
        if category in row:
            counts[row[category], list(experts)] += 1
    return counts / counts.sum(1, keepdims=True).clip(1)


def _entropy(counts: Counter) -> float:
    p = np.array(list(counts.values()), float)
    p /= p.sum()
    return float(-(p * np.log(p)).sum())
