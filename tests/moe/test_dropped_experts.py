"""Routers that may not choose some experts, against loops over tokens."""

import pytest
import torch
from dynamic_dino.moe.hierarchical import HierarchicalRouter
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.routers import GATES, SoftmaxRouter
from dynamic_dino.moe.top_any import TopAnyRouter


def best_of(logits, allowed, k):
    return sorted(allowed, key=lambda e: (-logits[e], e))[:k]


@pytest.mark.parametrize("gate", GATES)
def test_softmax_router(gate):
    router = SoftmaxRouter(6, 5, 2, gate, tied=False, std=1.0)
    x = torch.randn(2, 7, 6)
    before = router(x)
    router.drop(1, 3)
    found = router(x)
    logits = (x.flatten(0, 1).double() @ router.weight.double().T).tolist()
    for t, row in enumerate(logits):
        ids = best_of(row, [0, 2, 4], 2)
        assert found.expert_ids[t].tolist() == ids
        soft = 2 * torch.tensor([row[e] for e in ids]).softmax(0)
        if gate == "indicator":
            assert found.gates is None  # all are one
        else:
            expected = soft if gate == "renormalized" else torch.ones(2)
            torch.testing.assert_close(found.gates[t], expected)
    assert torch.equal(found.probs, before.probs)  # what the router thinks is what it thinks
    router.drop()
    assert torch.equal(router(x).expert_ids, before.expert_ids)


def test_slots_stay_empty_where_too_few_experts_are_left():
    layer = MoEFeedForward(6, 8, SoftmaxRouter(6, 4, 2)).eval()
    layer.router.drop(0, 1, 3)
    x = torch.randn(1, 5, 6)
    y, routing = layer(x)
    assert routing.expert_ids.tolist() == [[2, -1]] * 5 and routing.gates is None
    e = layer.experts
    expected = (x @ e.w1[2].T + e.b1[2]).relu() @ e.w2[2].T + e.b2[2]
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("variant", ["full", "instance", "scene"])
def test_hierarchical_router(variant):
    router = HierarchicalRouter(6, 8, 2, num_routes=4, active_routes=2, variant=variant, std=1.0)
    tokens, scene = torch.randn(3, 5, 6), torch.randn(3, 6)
    before = router(tokens, scene)
    router.drop(*torch.randperm(8)[:3].tolist())
    found = router(tokens, scene)
    for t in range(15):
        allowed = set(range(8)) - {*router.dropped}
        if variant != "instance":
            routes = before.scene_routes[t].tolist()
            allowed &= {e for r in routes for e in (2 * r, 2 * r + 1)}
        probs = before.probs[t].tolist()
        ids = best_of(probs, allowed, 2)
        assert found.expert_ids[t].tolist() == ids + [-1] * (2 - len(ids))
        total = sum(probs[e] for e in ids)
        gates = [probs[e] / total for e in ids] + [0.0] * (2 - len(ids))
        torch.testing.assert_close(found.gates[t], torch.tensor(gates))


def test_top_any_router_as_if_the_slot_were_switched_off():
    router = TopAnyRouter(6, 5, 4).eval()
    with torch.no_grad():
        router.thresholds.normal_(0, 0.3)
    x = torch.randn(2, 9, 6)
    router.drop(2)
    found = router(x)
    router.drop()
    router.active[2] = False
    expected = router(x)
    assert torch.equal(found.expert_ids, expected.expert_ids)
    assert torch.equal(found.gates, expected.gates)
