"""DynMoE's router, its loss, and its statistics, against the formulas."""

import copy

import pytest
import torch
from detectron2.config import LazyCall as L
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.losses import SparseGatingLoss
from dynamic_dino.moe.routing import Routing
from dynamic_dino.moe.statistics import RoutingStatistics, sibling_tokens, training_metrics
from dynamic_dino.moe.top_any import TopAnyRouter
from torch import nn


def router(dim=12, experts=8, active=6, **options) -> TopAnyRouter:
    """With thresholds that some tokens reach nowhere, and rows that are not orthonormal."""
    result = TopAnyRouter(dim, experts, active, **options)
    nn.init.normal_(result.weight)
    nn.init.normal_(result.thresholds, 0.3, 0.05)
    return result


def scores(module: TopAnyRouter, x):
    """Equation 3 and what equation 4 compares; the switched-off columns left out."""
    cosine = nn.functional.cosine_similarity(x[:, None], module.weight[None], dim=-1)
    return cosine.sigmoid(), module.thresholds.sigmoid(), module.active


def layer(ffn, experts=6, active=4, **options) -> MoEFeedForward:
    return MoEFeedForward(ffn.dim, ffn.hidden, router=router(ffn.dim, experts, active), **options)


def test_router_by_the_formula():
    module, x = router(), torch.randn(3, 40, 12)
    s, limit, active = scores(module, x.flatten(0, 1))
    chosen = (s > limit) & active
    assert (chosen.sum(1) == 0).any() and (chosen.sum(1) > 1).any(), "there is something to see"
    for training in (True, False):
        result = module.train(training)(x)
        want = chosen.clone()
        if not training:
            none = ~chosen.any(1)
            want[none, s.masked_fill(~active, -1).argmax(1)[none]] = True
        found = torch.zeros_like(want, dtype=torch.float)
        for t, (ids, gates) in enumerate(zip(result.expert_ids, result.gates, strict=True)):
            found[t, ids[ids >= 0].long()] = gates[ids >= 0].detach()
            assert (gates[ids < 0] == 0).all()
        torch.testing.assert_close(found, want / want.sum(1, keepdim=True).clamp(min=1))
        torch.testing.assert_close(result.probs, s)
        assert result.active.tolist() == [True] * 6 + [False] * 2
        assert (result.keys is module.weight) == (result.tokens is not None) == training


def test_gradients_go_straight_through():
    """d gate / d score = 1 / k and d gate / d sigmoid(G) = -1 / k, of the chosen ones only."""
    module, x = router(), torch.randn(1, 30, 12)
    result = module(x)
    wanted = torch.randn_like(result.gates)
    (result.gates * wanted).sum().backward()
    twin = copy.deepcopy(module)
    twin.zero_grad()
    s, limit, _ = scores(twin, x[0])
    k = (result.expert_ids >= 0).sum(1)
    total = sum(
        wanted[t, slot] * (s[t, e] - limit[e]) / k[t]
        for t, row in enumerate(result.expert_ids.tolist())
        for slot, e in enumerate(row)
        if e >= 0
    )
    total.backward()
    torch.testing.assert_close(module.weight.grad, twin.weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.thresholds.grad, twin.thresholds.grad, rtol=1e-4, atol=1e-5)
    used = result.expert_ids.unique().tolist()
    assert all((module.thresholds.grad[e] != 0) == (e in used) for e in range(8))


@pytest.mark.parametrize("k", range(1, 9))
def test_forced_k(k):
    module, x = router(forced_k=k).eval(), torch.randn(2, 9, 12)
    result = module(x)
    s, _, active = scores(module, x.flatten(0, 1))
    best = s.masked_fill(~active, -1).topk(min(k, 6)).indices
    ids = result.expert_ids
    assert ids.shape == (18, k) and torch.equal(ids[:, :6].long(), best)
    assert (ids[:, 6:] == -1).all()
    torch.testing.assert_close(result.gates[:, :6], torch.full(best.shape, 1 / min(k, 6)))
    assert module.train()(x).expert_ids.shape == (18, 8), "training is top-any"


def test_any_active_set_is_the_dense_ffn(ffn):
    moe = layer(ffn).eval()
    drawn = copy.deepcopy(moe.router.state_dict())
    assert not any(moe.load_state_dict(ffn.state))
    torch.testing.assert_close(moe.router.state_dict(), drawn, rtol=0, atol=0)
    x = torch.randn(3, 50, ffn.dim)
    for active in (0b000001, 0b100000, 0b101101, 0b111111):
        moe.router.active.copy_(torch.tensor([bool(active >> e & 1) for e in range(6)]))
        for moe.router.forced_k in (None, 1, 3, 6):
            y, routing = moe(x)
            torch.testing.assert_close(y, ffn.module(x)[0], rtol=1e-4, atol=1e-4)
            used = set(routing.expert_ids.unique().tolist()) - {-1}
            assert used and all(active >> e & 1 for e in used)


def test_in_training_a_token_without_experts_gets_nothing(ffn):
    moe = layer(ffn)
    moe.load_state_dict(ffn.state)
    x = torch.randn(3, 50, ffn.dim)
    y, routing = moe(x)
    none = (routing.expert_ids < 0).all(1)
    assert none.any() and not none.all()
    y, dense = y.flatten(0, 1), ffn.module(x)[0].flatten(0, 1)
    assert (y[none] == 0).all()
    torch.testing.assert_close(y[~none], dense[~none], rtol=1e-4, atol=1e-4)
    assert torch.equal(routing.tokens, x.flatten(0, 1)) and not routing.tokens.requires_grad


def test_detection_gradient_reaches_rows_and_thresholds(ffn):
    moe = layer(ffn)
    y, _ = moe(torch.randn(2, 60, ffn.dim))
    (y * torch.randn_like(y)).sum().backward()
    for parameter in moe.parameters():
        assert (
            (parameter.grad[:4].flatten(1).abs().sum(1) > 0).all()
            if parameter.ndim > 1
            else ((parameter.grad[:4] != 0).all())
        )
        assert (parameter.grad[4:] == 0).all(), "what is switched off gets no gradient"


def test_checkpoint_keeps_the_active_set(ffn):
    source = layer(ffn)
    source.router.active[2] = False
    source.router.activations += torch.arange(6)
    source.router.unrouted.normal_()
    target = layer(ffn)
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)
    names = ("weight", "thresholds", "active", "activations", "unrouted")
    assert {f"router.{name}" for name in names} <= source.state_dict().keys()


@pytest.mark.parametrize("options", [dict(initial_experts=0), dict(forced_k=9)])
def test_errors(options):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"{name}={value} must lie between 1 and num_experts=8"):
        TopAnyRouter(4, 8, **options)


def test_layer_and_router_must_agree():
    with pytest.raises(ValueError, match="expert_hidden=7 is not the size 24"):
        MoEFeedForward(12, 24, router=router(), expert_hidden=7)
    small = MoEFeedForward(12, 24, router=router(), expert_hidden=7, init_experts=False)
    assert small.experts.w1.shape == (8, 7, 12) and small.router.top_k == 8


@pytest.mark.parametrize("model", ["nano", "edge"])
def test_tuned_detector_equals_dense(model, request):
    """A whole detector, whatever the active set."""
    dense = request.getfixturevalue(model)
    dim = dense.config.decoder.layer.ffn.dim
    node = L(TopAnyRouter)(dim=dim, num_experts=5, initial_experts=3)
    moe = dense.with_experts(router=node)
    moe.decoder.layers[0].ffn.router.active.copy_(torch.tensor([False, True, False, True, True]))
    output = dense.decode(moe)
    for a, b in zip(dense.output.layers, output.layers, strict=True):
        assert a.boxes.std((0, 1)).min() > 0.01
        torch.testing.assert_close(a.boxes, b.boxes, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=1e-3)
    assert any((r.expert_ids >= 0).sum(1).unique().numel() > 1 for r in output.routings)


# The loss ----------------------------------------------------------------------------------------
def test_sparse_gating_loss_by_the_formula():
    modules = [router(), router(5, 4, 4)]
    routings = [m(torch.randn(1, 6, m.weight.shape[1])) for m in modules]
    terms = []
    for module in modules:
        w = module.weight[module.active]
        terms.append((w @ w.T - torch.eye(len(w))).norm() + w.norm(dim=1).mean())
    loss = SparseGatingLoss(0.3)(routings)
    torch.testing.assert_close(loss, 0.3 * sum(terms) / 2)
    loss.backward()
    assert (modules[0].weight.grad[:6] != 0).all() and (modules[0].weight.grad[6:] == 0).all()


def test_sparse_gating_loss_at_its_start_and_of_other_routers():
    module = TopAnyRouter(32, 8)
    loss = SparseGatingLoss(1.0)([module(torch.randn(1, 4, 32))])
    assert loss.item() == pytest.approx(1, abs=1e-4), "orthonormal rows: only their length counts"
    loss.backward()
    assert module.weight.grad.isfinite().all()
    other = Routing(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), torch.ones(1, 2))
    with pytest.raises(ValueError, match="Routing.keys"):
        SparseGatingLoss()([other])


# Statistics --------------------------------------------------------------------------------------
def test_siblings_with_empty_slots():
    """Four copies of two parts in four slots."""
    ids = torch.tensor([[0, 1, -1, -1], [7, -1, 6, -1], [3, -1, -1, -1], [0, 2, -1, -1]])
    ids = torch.cat([ids, torch.full((1, 4), -1), torch.tensor([[0, 1, 2, 3]])])
    siblings, same_part = sibling_tokens(ids, 2)
    assert siblings.tolist() == [True, True, False, False, False, False]
    assert same_part.tolist() == [False, False, False, True, False, True]


def test_statistics_of_a_varying_number():
    active = torch.tensor([True, True, True, False])
    ids = torch.tensor([[0, 1, -1, -1], [-1, -1, -1, -1], [1, -1, -1, -1]], dtype=torch.int32)
    routing = Routing(ids, (ids >= 0).float(), torch.rand(3, 4), active=active, parts=1)
    statistics = RoutingStatistics()
    statistics.update([routing])
    statistics.update([routing.slice_tokens(1, 2)])  # the last token again
    [row] = RoutingStatistics.merged([RoutingStatistics(), statistics]).summary()
    assert row["load"] == pytest.approx([1 / 4, 3 / 4, 0, 0])
    assert (row["active_experts"], row["dead_experts"], row["rare_experts"]) == (3, 1, 1)
    assert row["experts_per_token"] == 1
    assert row["experts_per_token_distribution"] == [1 / 4, 1 / 2, 1 / 4, 0, 0]
    assert row["siblings"] == row["same_part"] == -1

    metrics = {k.split("/")[-1]: v.item() for k, v in training_metrics([routing]).items()}
    assert metrics["active_experts"] == 3 and metrics["dead_experts"] == 1
    assert metrics["experts_per_token"] == pytest.approx(1)
    assert metrics["unrouted_tokens"] == pytest.approx(1 / 3)
    assert "siblings" not in metrics
    even = Routing(torch.tensor([[0, 1, 2]]).int(), torch.ones(1, 3), routing.probs, active=active)
    assert training_metrics([even])["moe/layer0/load_entropy"].item() == pytest.approx(1)


def test_every_field_survives_cat_and_slice():
    parts = [router()(torch.randn(2, n, 12)) for n in (3, 5)]
    whole = Routing.cat(parts)
    kept = whole.slice_tokens(2, 1)
    for result, count in ((whole, 16), (kept, 14)):
        assert {len(getattr(result, n)) for n in ("expert_ids", "gates", "probs", "tokens")} == {
            count
        }
        assert result.keys is parts[1].keys and result.active is parts[1].active
    assert torch.equal(whole.tokens, torch.cat([p.tokens for p in parts]))
