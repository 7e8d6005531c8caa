"""Routing statistics against numbers by hand."""

import json
import math

import pytest
import torch
from dynamic_dino.moe.routing import Routing
from dynamic_dino.moe.statistics import (
    RoutingStatistics,
    normalised_entropy,
    sibling_tokens,
    training_metrics,
)


def routing(ids, experts) -> Routing:
    ids = torch.tensor(ids, dtype=torch.int32)
    return Routing(ids, torch.ones(ids.shape), torch.full((len(ids), experts), 1 / experts))


def test_siblings_and_same_parts():
    # Four copies of two parts: experts 2c and 2c + 1.
    ids = torch.tensor([[0, 1], [1, 0], [7, 6], [1, 2], [0, 2], [3, 7], [4, 1]])
    siblings, same_part = sibling_tokens(ids)
    assert siblings.tolist() == [True, True, True, False, False, False, False]
    assert same_part.tolist() == [False, False, False, False, True, True, False]


def test_siblings_of_four_parts():
    ids = torch.tensor([[3, 1, 0, 2], [4, 5, 6, 7], [0, 5, 2, 7], [0, 1, 2, 6], [0, 4, 1, 2]])
    siblings, same_part = sibling_tokens(ids)
    assert siblings.tolist() == [True, True, False, False, False]
    assert same_part.tolist() == [False, False, False, True, True]


def test_single_choice_is_always_a_whole_copy():
    siblings, same_part = sibling_tokens(torch.tensor([[0], [5]]))
    assert siblings.all() and not same_part.any()


def test_entropy():
    assert normalised_entropy(torch.full((8,), 1 / 8)).item() == pytest.approx(1)
    assert normalised_entropy(torch.tensor([0.0, 1, 0])).item() == pytest.approx(0)
    half = normalised_entropy(torch.tensor([0.5, 0.5, 0, 0])).item()
    assert half == pytest.approx(math.log(2) / math.log(4))
    assert normalised_entropy(torch.tensor([1.0])).item() == pytest.approx(0)


def test_summary_by_hand():
    statistics = RoutingStatistics()
    # 201 tokens, 402 slots: 400 for experts 0 and 1, one each for 2 and 4
    statistics.update([routing([[0, 1]] * 100 + [[2, 4]], 6)])
    statistics.update([routing([[1, 0]] * 100, 6)])
    [row] = statistics.summary()
    assert row["load"] == pytest.approx([200 / 402, 200 / 402, 1 / 402, 0, 1 / 402, 0])
    entropy = -(2 * 200 / 402 * math.log(200 / 402) + 2 / 402 * math.log(1 / 402)) / math.log(6)
    assert row["load_entropy"] == pytest.approx(entropy)
    assert row["siblings"] == pytest.approx(200 / 201)
    assert row["same_part"] == pytest.approx(1 / 201)
    assert (row["rare_experts"], row["dead_experts"]) == (4, 2)


def test_batches_add_up():
    statistics, whole = RoutingStatistics(), RoutingStatistics()
    batches = [
        [routing(torch.rand(n, e).argsort(1)[:, :2].tolist(), e) for e in (4, 8)] for n in (3, 9, 1)
    ]
    for batch in batches:
        statistics.update(batch)
    whole.update([Routing.cat(layer) for layer in zip(*batches, strict=True)])
    assert statistics.summary() == whole.summary() and len(whole.summary()) == 2
    assert sum(whole.summary()[1]["load"]) == pytest.approx(1)


def test_training_metrics_say_the_same():
    layers = [routing(torch.rand(30, 8).argsort(1)[:, :2].tolist(), 8) for _ in range(2)]
    statistics = RoutingStatistics()
    statistics.update(layers)
    metrics = training_metrics(layers)
    assert len(metrics) == 12
    for i, row in enumerate(statistics.summary()):
        for name in ("load_entropy", "siblings", "same_part", "dead_experts"):
            assert metrics[f"moe/layer{i}/{name}"].item() == pytest.approx(row[name])
        assert metrics[f"moe/layer{i}/load_max"].item() == pytest.approx(max(row["load"]))
        p = layers[i].probs
        entropy = -(p * p.log()).sum(1).mean().item() / math.log(8)
        assert metrics[f"moe/layer{i}/router_entropy"].item() == pytest.approx(entropy, abs=1e-5)
    assert training_metrics([]) == {}


def test_state_gives_the_statistics_back():
    rng = torch.Generator().manual_seed(torch.initial_seed())
    ids = torch.randint(-1, 6, (2, 50, 3), generator=rng, dtype=torch.int32)
    layers = [Routing(i, torch.ones(i.shape), torch.ones(50, 6) / 6) for i in ids]
    layers[1].active, layers[1].parts = torch.tensor([True] * 5 + [False]), 1
    statistics = RoutingStatistics()
    statistics.update(layers)
    state = json.loads(json.dumps(statistics.state()))
    assert RoutingStatistics.of(state).summary() == statistics.summary()
    assert RoutingStatistics.of([]).summary() == []
