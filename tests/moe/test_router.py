"""The softmax router, `Routing`, and the load-balance loss."""

import pytest
import torch
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.losses import LoadBalanceLoss, expert_load
from dynamic_dino.moe.routers import GATES, SoftmaxRouter
from dynamic_dino.moe.routing import Routing


def routing(ids, probs=None, experts=4) -> Routing:
    ids = torch.tensor(ids, dtype=torch.int32)
    probs = torch.full((len(ids), experts), 1 / experts) if probs is None else torch.tensor(probs)
    return Routing(ids, (ids >= 0).float(), probs)


@pytest.mark.parametrize("gate", GATES)
def test_routing_of_a_router(gate):
    router = SoftmaxRouter(6, 5, 3, gate, tied=False, std=1.0)
    x = torch.randn(2, 7, 6)
    result = router(x)
    logits = x.flatten(0, 1) @ router.weight.T
    torch.testing.assert_close(result.probs, logits.softmax(-1))
    values, ids = logits.topk(3)
    assert torch.equal(result.expert_ids, ids.int()) and result.expert_ids.dtype == torch.int32
    if gate == "indicator":
        assert result.gates is None  # all are one
    else:
        gates = 3 * values.softmax(-1) if gate == "renormalized" else torch.ones(14, 3)
        torch.testing.assert_close(result.gates, gates)
    assert result.num_experts == 5


@pytest.mark.parametrize("k", [1, 2, 4])
def test_equal_rows_choose_the_first_experts(k):
    router = SoftmaxRouter(6, 64, k)
    for weight in (torch.zeros(64, 6), torch.randn(6).expand(64, 6)):
        router.weight.data.copy_(weight)
        ids = router(torch.randn(3, 50, 6)).expert_ids
        assert torch.equal(ids, torch.arange(k, dtype=torch.int32).expand(150, k))


def test_ties_go_to_the_lowest_index():
    """Small integers, whose sums are exact, tie often."""
    router = SoftmaxRouter(3, 32, 5, tied=False)
    router.weight.data = torch.randint(-1, 2, (32, 3)).float()
    x = torch.randint(-1, 2, (1, 60, 3)).float()
    logits = (x[0] @ router.weight.T).tolist()
    expected = [sorted(range(32), key=lambda e, row=row: (-row[e], e))[:5] for row in logits]
    assert router(x).expert_ids.tolist() == expected
    assert any(len(set(row)) < 32 for row in logits)


def test_fp32_inside_autocast():
    router = SoftmaxRouter(256, 16, 2, "renormalized")
    x = torch.randn(1, 500, 256)
    exact = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        result = router(x)
        rounded = router(x.bfloat16())
    assert torch.equal(result.expert_ids, exact.expert_ids)
    assert torch.equal(result.probs, exact.probs) and result.gates.dtype == torch.float32
    assert (rounded.expert_ids.sort(1).values.diff(dim=1) == 1).all(), "siblings part in bf16"
    assert (rounded.expert_ids.amin(1) % 2 == 0).all()


def test_tied_rows():
    router = SoftmaxRouter(6, 12, 3)
    rows = router.weight.view(4, 3, 6)
    assert torch.equal(rows, rows[:, :1].expand_as(rows)) and len(rows[:, 0].unique(dim=0)) == 4
    assert len(SoftmaxRouter(6, 12, 3, tied=False).weight.unique(dim=0)) == 12
    with pytest.raises(ValueError, match="num_experts=12 is not a multiple of top_k=5"):
        SoftmaxRouter(6, 12, 5)


def test_cat():
    parts = [routing(torch.randint(4, (n, 2)).tolist(), torch.rand(n, 4).tolist()) for n in (3, 5)]
    whole = Routing.cat(parts)
    for name in ("expert_ids", "gates", "probs"):
        a, b = (getattr(p, name) for p in parts)
        assert torch.equal(getattr(whole, name)[:3], a)
        assert torch.equal(getattr(whole, name)[3:], b)


def test_slice_tokens():
    """Three images of five tokens; the first two of each go."""
    ids = torch.arange(15).view(15, 1).int()
    whole = Routing(ids, ids.float(), ids * 10.0)
    kept = whole.slice_tokens(3, 2)
    assert kept.expert_ids[:, 0].tolist() == [2, 3, 4, 7, 8, 9, 12, 13, 14]
    assert torch.equal(kept.gates * 10, kept.probs)
    assert torch.equal(whole.slice_tokens(3, 0).expert_ids, ids)


# Load-balance loss -------------------------------------------------------------------------------
def test_load_of_filled_slots():
    load = expert_load(routing([[0, 1], [0, -1], [0, 3]]))
    assert load.tolist() == pytest.approx([3 / 5, 1 / 5, 0, 1 / 5])
    assert expert_load(routing([[-1, -1]])).tolist() == [0, 0, 0, 0]


def test_even_load_costs_alpha():
    even = routing([[0, 1], [2, 3], [1, 2], [3, 0]])
    assert LoadBalanceLoss(0.01)([even]).item() == pytest.approx(0.01)


def test_load_balance_by_hand():
    probs = [[0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1], [0.1, 0.8, 0.05, 0.05]]
    first = routing([[0, 1], [0, 1], [1, -1]], probs)
    # load [2/5, 3/5, 0, 0], mean probability [0.4, 0.4, ...]
    expected = 4 * (2 / 5 * 0.4 + 3 / 5 * 0.4)
    assert LoadBalanceLoss(1.0)([first]).item() == pytest.approx(expected)
    both = LoadBalanceLoss(0.5)([first, routing([[0, 1], [2, 3]])]).item()
    assert both == pytest.approx(0.5 * (expected + 1) / 2)
    added = LoadBalanceLoss(0.5, over_layers="sum")([first, routing([[0, 1], [2, 3]])]).item()
    assert added == pytest.approx(0.5 * (expected + 1))
    with pytest.raises(ValueError, match="over_layers='max': choose mean or sum"):
        LoadBalanceLoss(over_layers="max")


def test_load_balance_pushes_towards_rare_experts():
    logits = torch.zeros(20, 4, requires_grad=True)
    ids = torch.zeros(20, 1, dtype=torch.int32)
    LoadBalanceLoss()([Routing(ids, torch.ones(20, 1), logits.softmax(-1))]).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


@pytest.mark.parametrize("backend", ["grouped", "triton"])
@pytest.mark.parametrize("gate", GATES)
def test_one_call_with_the_experts_is_router_and_experts(gate, backend):
    layer = MoEFeedForward(40, 24, SoftmaxRouter(40, 6, 2, gate), backend=backend)
    layer.eval().requires_grad_(False)
    layer.router.weight.normal_()
    x, norm = torch.randn(2, 19, 40), torch.nn.LayerNorm(40).requires_grad_(False)
    expected, routing = layer(x, None, norm)
    y, routed = layer.experts.with_router(x.flatten(0, 1), norm, **layer.router.block())
    torch.testing.assert_close(y.view_as(x), expected)
    assert torch.equal(routed.expert_ids, routing.expert_ids)
    torch.testing.assert_close(routed.probs, routing.probs)
    assert (routed.gates is None) == (gate != "renormalized")
    layer.router.drop(1)
    assert layer.router.block() is None
