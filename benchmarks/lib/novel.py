"""Names that were held out of training: how many are near-synonyms of learnt ones, and chance.

AP of a held-out name alone doesn't say that the name was understood: a box may be found because the
name is close to one that was learnt, or because some asked name always gets it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from dynamic_dino.data.datasets import get_metadata, load_datasets
from dynamic_dino.data.fields import Id, id_array
from dynamic_dino.data.ground_truth import categories_of
from dynamic_dino.data.mapper import TestMapper
from dynamic_dino.evaluation import DatasetPredictions, Interval
from dynamic_dino.evaluation.bootstrap import resampled_ap


def held_out(truth: dict, dataset: str, mapper: TestMapper) -> dict[str, list[Id]]:
    """Of the held-out names that have objects, metric suffix -> category ids: "_near" have a
    near-synonym among the learnt names, "_far" have none, "_novel" are both; {} where there are no
    such objects.

    Args:
        truth: what `read_ground_truth` returns, of the data set; mapper: that asks for its names.
    """
    metadata = get_metadata(dataset)
    novel = metadata.get("novel") or [False] * len(metadata.thing_classes)
    related = mapper.samplers[dataset].related
    there = {a["category_id"] for a in truth["annotations"] if not a["iscrowd"]}
    groups: dict[str, list[Id]] = {"_novel": [], "_near": [], "_far": []}
    for i, category in enumerate(categories_of(metadata)):
        if novel[i] and category["id"] in there:
            near = any(not novel[other] for other in related[i])
            for group in ("_novel", "_near" if near else "_far"):
                groups[group].append(category["id"])
    return groups if groups["_novel"] else {}


def asked_names(dataset: str, mapper: TestMapper) -> dict[Id, list[Id]]:
    """Image id -> ids of the categories that the image is asked for."""
    ids = [category["id"] for category in categories_of(get_metadata(dataset))]
    return {
        record["image_id"]: [ids[i] for i in mapper.asked_of(record)]
        for record in load_datasets(dataset)
    }


def chance(
    truth: dict,
    predictions: DatasetPredictions,
    asked: Mapping[Id, Collection[Id]],
    groups: Mapping[str, Collection[Id]],
    *,
    draws: int = 20,
    seed: int = 0,
) -> dict[str, Interval]:
    """AP of each group if the names meant nothing: the names that a photo is asked for change
    places with each other at random, in each photo anew. So boxes, scores, and which boxes share a
    name stay as they are; what they are called is drawn.

    Args:
        truth: what `read_ground_truth` returns; asked: see `asked_names`; groups: see `held_out`.

    Returns "AP<group>", "AP50<group>" -> the mean over the draws, and between which values 95 % of
    them lie; in percent. Groups without objects are left out.
    """
    rng = np.random.default_rng(seed)
    names = id_array(dict.fromkeys(name for group in asked.values() for name in group))
    column = {name: c for c, name in enumerate(names.tolist())}
    rows = {image: r for r, image in enumerate(asked)}
    row = np.array([rows[image] for image in predictions.image_ids.tolist()], dtype=int)
    name = np.array([column[c] for c in predictions.category_ids.tolist()], dtype=int)
    once = np.ones((1, len(truth["images"])), dtype=int)
    found: dict[str, list[float]] = {}
    for _ in range(draws):
        drawn = np.full((len(rows), len(names)), -1)
        for image, group in asked.items():
            places = [column[name] for name in group]
            drawn[rows[image], places] = rng.permutation(places)
        renamed = predictions[:]
        renamed.category_ids = names[drawn[row, name]]
        for metric, value in resampled_ap(truth, renamed, once, groups=groups).items():
            found.setdefault(metric, []).append(float(value[0]))
    return {
        metric: Interval(float(np.mean(values)), *map(float, np.percentile(values, [2.5, 97.5])))
        for metric in (f"{kind}{group}" for kind in ("AP", "AP50") for group in groups)
        if not np.isnan((values := found[metric])[0])
    }
