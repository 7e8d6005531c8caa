"""Removing and adding experts, by numbers."""

import pytest
import torch
from dynamic_dino.moe.adaptive import AdaptiveExperts
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.routers import SoftmaxRouter
from dynamic_dino.moe.routing import Routing
from dynamic_dino.moe.top_any import TopAnyRouter
from torch import nn


@pytest.fixture
def model():
    """A top-any layer of 5 slots, 4 active, behind a layer of another kind."""
    layers = [
        MoEFeedForward(4, 6, SoftmaxRouter(4, 2, 1)),
        MoEFeedForward(4, 6, TopAnyRouter(4, 5, 4)),
    ]
    for parameter in layers[1].experts.parameters():
        nn.init.normal_(parameter)
    return nn.ModuleList(layers)


def routings(ids, tokens):
    ids = torch.tensor(ids, dtype=torch.int32)
    other = Routing(torch.zeros(3, 1).int(), torch.ones(3, 1), torch.ones(3, 2))
    return [other, Routing(ids, (ids >= 0) / 1.0, torch.rand(len(ids), 5), tokens=tokens)]


def test_records_add_up(model):
    process, router = AdaptiveExperts(model), model[1].router
    tokens = torch.randn(2, 3, 4)
    process.record(routings([[0, 1], [-1, -1], [1, -1]], tokens[0]))
    process.record(routings([[-1, -1], [3, -1], [-1, -1]], tokens[1]))
    assert router.activations.tolist() == [1, 2, 0, 1, 0]
    torch.testing.assert_close(router.unrouted, tokens[0, 1] + tokens[1, 0] + tokens[1, 2])


def test_a_change_by_the_algorithm(model):
    process, layer = AdaptiveExperts(model), model[1]
    router, experts = layer.router, layer.experts
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    sum(p.square().sum() for p in layer.parameters()).backward()
    optimizer.step()
    lone = torch.randn(4)
    process.record(routings([[0, 3], [1, -1], [-1, -1]], torch.stack([lone * 0, lone * 0, lone])))
    before = {name: p.detach().clone() for name, p in experts.named_parameters()}
    kept = {p: optimizer.state[p]["exp_avg"].clone() for p in layer.parameters()}

    [change] = process.adapt(optimizer)
    # Slot 2 was never chosen, and it is the first free one for the new expert
    assert (change.layer, change.removed, change.added, change.active) == (0, [2], [2], 4)
    assert router.active.tolist() == [True] * 4 + [False]
    torch.testing.assert_close(router.weight[2], lone / lone.norm())
    assert router.thresholds[2] == 0
    for name, old in before.items():
        new = getattr(experts, name)
        torch.testing.assert_close(new[2], old[[0, 1, 3]].mean(0))
        others = torch.tensor([0, 1, 3, 4])
        assert torch.equal(new[others], old[others])
    for p, old in kept.items():
        moments = optimizer.state[p]
        assert (moments["exp_avg"][2] == 0).all() and (moments["exp_avg_sq"][2] == 0).all()
        assert torch.equal(moments["exp_avg"][[0, 1, 3, 4]], old[[0, 1, 3, 4]])
    assert not router.activations.any() and not router.unrouted.any()
    # The token that had no expert has one now
    assert router(lone.view(1, 1, 4)).expert_ids[0, 0] == 2


def test_removed_only_added_only_and_full(model):
    process, router = AdaptiveExperts(model), model[1].router
    process.record(routings([[0, -1], [1, 3]], torch.ones(2, 4)))
    [change] = process.adapt()
    assert (change.removed, change.added, change.active) == ([2], [], 3)
    for slot in (2, 4):
        process.record(routings([[0, 1, 2, 3, 4], [-1] * 5], torch.ones(2, 4)))
        [change] = process.adapt()
        assert (change.removed, change.added) == ([], [slot])
    process.record(routings([[0, 1, 2, 3, 4], [-1] * 5], torch.ones(2, 4)))
    assert process.adapt() == [] and router.active.all(), "there is no room"


def test_nobody_chosen_removes_nobody(model):
    process, router = AdaptiveExperts(model), model[1].router
    process.record(routings([[-1, -1]] * 2, torch.ones(2, 4)))
    [change] = process.adapt()
    assert (change.removed, change.added) == ([], [4]) and router.active.all()
    process.record(routings([[-1, -1]], torch.zeros(1, 4)))
    assert process.adapt() == [], "a sum of zero is no direction"


def test_the_average_follows(model):
    """Buffers, and the weights of the new expert; the other weights stay averages."""
    average = nn.ModuleList(
        [MoEFeedForward(4, 6, SoftmaxRouter(4, 2, 1)), MoEFeedForward(4, 6, TopAnyRouter(4, 5, 4))]
    )
    process = AdaptiveExperts(model)
    process.record(routings([[0, 1], [-1, -1]], torch.randn(2, 4)))
    changes = process.adapt()
    before = average[1].experts.w1.detach().clone()
    process.follow(average, changes)
    assert torch.equal(average[1].router.active, model[1].router.active)
    slot = changes[0].added[0]
    for a, b in zip(average[1].parameters(), model[1].parameters(), strict=True):
        assert torch.equal(a[slot], b[slot])
    others = [e for e in range(5) if e != slot]
    assert torch.equal(average[1].experts.w1[others], before[others])


def test_models_without_such_layers(model):
    with pytest.raises(ValueError, match="a MoE layer with a TopAnyRouter"):
        AdaptiveExperts(model[0])
    with pytest.raises(ValueError, match="0 layers report tokens.*1 top-any layers"):
        AdaptiveExperts(model).record(routings([[0]], None))
