"""Curves over training, DynMoE's figures and runs side by side show their numbers."""

import numpy as np
import pytest
import torch
from dynamic_dino.analysis import top_any_figures
from dynamic_dino.analysis.collect import Collection, LayerCounts
from dynamic_dino.analysis.routing_figures import spread_figure, stability_figure
from dynamic_dino.analysis.summary import side_by_side
from dynamic_dino.analysis.training import training_curves
from dynamic_dino.evaluation.predictions import DatasetPredictions
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.routing import Routing
from dynamic_dino.moe.statistics import RoutingStatistics
from dynamic_dino.moe.top_any import TopAnyRouter
from torch import nn


def collection(layers, statistics=(), dataset="set"):
    nothing = np.zeros((0, len(layers), 2), np.int16)
    return Collection(
        dataset, layers, list(statistics), DatasetPredictions.cat([]), nothing, {}, {}
    )


def test_curves_are_means_over_runs(rng):
    def rows(values):
        logged = [{"iteration": 5 * i, "moe/layer0/load_entropy": v} for i, v in enumerate(values)]
        return [*logged, {"iteration": 99}, {"iteration": 1, "val/moe/layer0/load_entropy": 7}]

    runs = {f"seed{n}": rows(rng.random(4)) for n in range(3)}
    figure = training_curves(runs)
    values = np.array([[r["moe/layer0/load_entropy"] for r in rows[:4]] for rows in runs.values()])
    assert [row[2] for row in figure.rows] == [0, 5, 10, 15]
    np.testing.assert_allclose([row[3] for row in figure.rows], values.mean(0))
    np.testing.assert_allclose([row[4] for row in figure.rows], values.std(0, ddof=1))
    axis = figure.image.axes[0]
    np.testing.assert_allclose(axis.lines[0].get_xydata(), np.c_[[0, 5, 10, 15], values.mean(0)])
    assert len(axis.collections) == 1  # the band
    one = training_curves({"run": runs["seed0"]})
    assert not one.image.axes[0].collections and one.rows[0][4:] == [0, 1]
    assert training_curves({"run": [{"iteration": 0, "lr": 1}]}) is None
    assert training_curves({}) is None


def test_side_by_side(rng):
    values = rng.random(3)
    runs = {f"seed{i}": {"AP": v} for i, v in enumerate(values.tolist())}
    runs["seed1"]["only"] = 2.0
    found = {row[0]: row[1:] for row in side_by_side(runs, "").rows}
    assert found["AP"][:3] == values.tolist()
    assert found["AP"][3:] == pytest.approx([values.mean(), values.std(ddof=1)])
    assert found["only"] == [None, 2.0, None, 2.0, None]
    assert side_by_side({"val": {"AP": 1.5}}, "").rows == [["AP", 1.5]]


def test_loads_of_several_runs_are_ranked(rng):
    loads = rng.integers(1, 50, (3, 4))
    runs = {str(n): collection([LayerCounts("decoder 0", load)]) for n, load in enumerate(loads)}
    figure = spread_figure(runs, "")
    shares = np.array([sorted(load / load.sum(), reverse=True) for load in loads])
    np.testing.assert_allclose([row[2] for row in figure.rows], shares.mean(0))
    np.testing.assert_allclose([row[3] for row in figure.rows], shares.std(0, ddof=1))


def test_stability_compares_every_two_data_sets(rng):
    pairs = rng.integers(0, 30, (3, 5, 5))
    sets = [
        collection([LayerCounts("decoder 0", pairs=p + p.T)], dataset=f"set {n}")
        for n, p in enumerate(pairs)
    ]
    figure = stability_figure(sets, "")
    found = {(row[0], row[1]): row[3] for row in figure.rows}
    upper = np.triu_indices(5, 1)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        both = [(pairs[n] + pairs[n].T)[upper] for n in (a, b)]
        assert found[f"set {a}", f"set {b}"] == pytest.approx(np.corrcoef(*both)[0, 1])


def test_dynmoe():
    """Two layers of 5 slots, 3 of them active."""
    layers = nn.ModuleList(MoEFeedForward(6, 4, router=TopAnyRouter(6, 5, 3)) for _ in range(2))
    for parameter in layers.parameters():
        nn.init.normal_(parameter)
    statistics, counts, routings = RoutingStatistics(), [], []
    active = layers[0].router.active
    for n in range(2):
        ids = torch.stack([torch.randperm(5) for _ in range(30)])
        ids[(torch.rand(30, 5) < 0.5) | (ids > 2)] = -1
        routings.append(Routing(ids.int(), ids / 1.0, torch.rand(30, 5), active=active, parts=1))
        counts.append(LayerCounts(f"decoder {n}"))
        counts[n].add(routings[n], ids.numpy())
    statistics.update(routings)
    model = nn.ModuleDict({"decoder": layers})
    found = top_any_figures.top_any_figures(model, collection(counts, statistics.summary()), "")
    taken, frequency, similarity, thresholds, shared = found
    for n, routing in enumerate(routings):
        number = (routing.expert_ids >= 0).sum(1)
        assert taken.image.axes[0].patches[n].get_height() == pytest.approx(number.float().mean())
        share = (torch.bincount(number, minlength=6) / 30).tolist()
        assert [row[2] for row in taken.rows[6 * n : 6 * n + 6]] == pytest.approx(share)
        share = [(routing.expert_ids == e).any(1).float().mean().item() for e in range(5)]
        assert [row[2] for row in frequency.rows[5 * n : 5 * n + 5]] == pytest.approx(share)
        assert frequency.image.axes[0].collections[n].get_sizes() / 300 == pytest.approx(share)
    weight = layers[1].router.weight[:3].detach()
    expected = nn.functional.cosine_similarity(weight[:, None], weight[None], dim=-1)
    shown = similarity.image.axes[1].images[0].get_array()
    np.testing.assert_allclose(shown, expected, atol=1e-5)
    heights = [bar.get_height() for bar in thresholds.image.axes[1].patches]
    assert heights == pytest.approx(layers[1].router.thresholds[:3].tolist())
    limits = layers[1].router.thresholds[:3]
    lowest, loads = int(limits.argmin()), torch.tensor(share[:3])
    others = torch.arange(3) != lowest
    expected = [float(loads[lowest]), float(loads[others].mean())]
    assert shared.rows[1][:2] == ["decoder 1", lowest]
    assert shared.rows[1][4:6] == pytest.approx(expected)
    dense = nn.ModuleDict({"decoder": nn.Linear(2, 2)})
    assert top_any_figures.top_any_figures(dense, collection([]), "") == []
