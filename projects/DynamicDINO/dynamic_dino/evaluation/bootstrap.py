"""How far AP would move with other images: intervals by the bootstrap over images.

A data set's images are drawn anew, with replacement, and AP is computed of those that were drawn
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993). It says what a test set of this size
can tell. What another seed of training would change, it can't say.

A drawn set repeats images, about 63 % of them are in it, and on fewer images AP is higher: there is
less that a class can be mistaken for. The percentiles are therefore moved by what the drawn sets
are above the whole one on average (their bias, chapter 10 there).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .coco import groups_of, ids_of, read_ground_truth
from .matching import match
from .predictions import DatasetPredictions

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
Source = str | Path | Iterable[dict] | DatasetPredictions


@dataclass(frozen=True)
class Interval:
    """value  of the data set as it is
    low, high  percentiles of the data sets drawn from it, less their bias
    """

    value: float
    low: float
    high: float


def bootstrap(
    ground_truth: str | Path | dict,
    predictions: Source,
    against: Source | None = None,
    *,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    max_dets: int = 100,
    groups: Mapping[str, Collection[int]] | None = None,
) -> dict[str, Interval]:
    """Intervals of COCO AP and AP50, and of AP<group> and AP50<group>, see `coco_ap`; in percent.

    Args:
        against: predictions of another detector on the same images. The intervals are then those
            of the difference, `predictions` less `against`, the same images drawn for both.
        samples: how many data sets are drawn; seed: of the drawing.
        level: share of them that lie within an interval.

    A class counts in the samples that have objects of it, as it does in COCO AP. A metric without
    ground truth is left out.

    Raises FileNotFoundError or ValueError as `coco_ap` does.
    """
    if samples < 2:
        raise ValueError(f"{samples} samples make no interval: take 1000")
    if not 0 < level < 1:
        raise ValueError(f"level {level} must lie between 0 and 1, as 0.95 does")
    truth = read_ground_truth(ground_truth)
    groups = groups_of(truth) if groups is None else groups
    number = len(truth["images"])
    if not number:
        raise ValueError("the ground truth has no images to draw from")
    drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), samples)
    times = np.concatenate([np.ones((1, number), dtype=drawn.dtype), drawn])
    found = resampled_ap(truth, predictions, times, max_dets=max_dets, groups=groups)
    if against is not None:
        other = resampled_ap(truth, against, times, max_dets=max_dets, groups=groups)
        found = {metric: values - other[metric] for metric, values in found.items()}
    least = 0 if against is None else -100
    return {
        metric: _interval(values[0], values[1:], level, least)
        for metric, values in found.items()
        if not np.isnan(values[0])
    }


def _interval(value: float, drawn: np.ndarray, level: float, least: float) -> Interval:
    tails = 100 * np.array([1 - level, 1 + level]) / 2
    bias = np.nanmean(drawn) - value
    low, high = np.clip(np.nanpercentile(drawn, tails) - bias, least, 100)
    return Interval(float(value), float(low), float(high))


def resampled_ap(
    ground_truth: str | Path | dict,
    predictions: Source,
    times: np.ndarray,
    *,
    max_dets: int = 100,
    groups: Mapping[str, Collection[int]] | None = None,
) -> dict[str, np.ndarray]:
    """Metric -> float [B], AP in percent of data sets that have the images some times each: int
    [B, images], in the order of the ground truth. NaN where there is no object.

    Boxes are matched once; then each counts as often as its image.
    """
    truth = read_ground_truth(ground_truth)
    predictions = DatasetPredictions.read(predictions)
    images, categories = ids_of(truth)
    predictions.check_ids(images, categories)
    row = {image: i for i, image in enumerate(images)}
    predictions = predictions.best_per_image_and_class(max_dets)
    order = np.argsort(-predictions.scores, kind="stable")
    predictions = predictions[order]
    right, counts = match(truth, predictions, IOUS)
    image = np.array([row[i] for i in predictions.image_ids.tolist()], dtype=int)

    objects = {category: np.zeros(len(images), dtype=int) for category in categories}
    for annotation in truth["annotations"]:
        if not annotation["iscrowd"]:
            objects[annotation["category_id"]][row[annotation["image_id"]]] += 1
    ap = np.full((len(categories), len(IOUS), len(times)), np.nan)
    for c, category in enumerate(categories):
        if objects[category].any():
            members = np.flatnonzero(predictions.category_ids == category)
            weights = times[:, image[members]].astype(float)
            wanted = times @ objects[category]
            for t in range(len(IOUS)):
                ap[c, t] = _ap(weights, right[t, members], counts[t, members], wanted)

    column = {category: c for c, category in enumerate(categories)}
    chosen = {"": range(len(categories))} | {
        suffix: [column[category] for category in members]
        for suffix, members in (groups or {}).items()
    }
    return {
        f"{metric}{suffix}": 100 * _mean(ap[list(members)][:, ious])
        for metric, ious in (("AP", slice(None)), ("AP50", slice(1)))
        for suffix, members in chosen.items()
    }


def _ap(
    weights: np.ndarray, right: np.ndarray, counts: np.ndarray, wanted: np.ndarray
) -> np.ndarray:
    """Of a class at an IoU, in [0, 1]: float [B], NaN where nothing is `wanted`, int [B].

    weights  [B, N], how often each box is there, the best first

    As in pycocotools: the mean over 101 recalls of the best precision at that recall or a higher
    one. Between two hits precision only falls, so the hits are all that must be looked at.
    """
    hits = np.flatnonzero(right)
    found = np.cumsum(weights[:, hits], 1)
    boxes = np.cumsum(weights * counts, 1)[:, hits]
    precision = found / np.maximum(boxes, 1)
    best = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    passed = np.searchsorted(RECALLS, found / np.maximum(wanted, 1)[:, None], side="right")
    passed[found == 0] = 0  # no box yet, so not even a recall of 0
    ap = (best * np.diff(passed, axis=1, prepend=0)).sum(1) / len(RECALLS)
    return np.where(wanted > 0, ap, np.nan)


def _mean(values: np.ndarray) -> np.ndarray:
    """Over classes and IoUs, [classes, IoUs, B] -> [B]; NaN are left out."""
    there = ~np.isnan(values)
    number = there.sum((0, 1))
    total = np.where(there, values, 0).sum((0, 1))
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)
