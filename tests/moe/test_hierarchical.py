"""HI-MoE's router and losses, against the formulas."""

import copy

import pytest
import torch
from detectron2.config import LazyCall as L
from dynamic_dino.export.experts import StaticHierarchy
from dynamic_dino.moe.experts import Experts
from dynamic_dino.moe.hierarchical import VARIANTS, HierarchicalRouter
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.losses import DiversityLoss, SquaredBalanceLoss, expert_load
from dynamic_dino.moe.routing import Routing
from dynamic_dino.moe.scene_router import SceneRouter
from dynamic_dino.moe.statistics import training_metrics
from torch import nn


def draw(images=5, tokens=7, dim=12):
    return torch.randn(images, tokens, dim), torch.randn(images, dim)


def router(variant="full", **options) -> HierarchicalRouter:
    options = dict(dim=12, num_experts=8, top_k=2, std=1.0) | options
    return HierarchicalRouter(variant=variant, **options)


def by_the_algorithm(module: HierarchicalRouter, q, scene, owned, keep: int, taus=(1.0, 1.0)):
    """One query of one image: Algorithm 1 line by line. Returns g, routes, e, {expert: weight}."""
    if module.variant == "instance":
        g, pool, inputs = None, set(range(module.num_experts)), q
    else:
        g = (module.scene_weight @ scene / taus[0]).softmax(0)
        routes = sorted(range(len(g)), key=lambda r: -g[r])[:keep]
        pool = {e for r in routes for e in owned[r]}
        inputs = torch.cat([q, g]) if module.variant == "full" else g
    e = (module.weight @ inputs / taus[1]).softmax(0)
    best = sorted(pool, key=lambda i: -e[i])[: module.top_k]
    weights = {i: (e[i] / sum(e[j] for j in best)).item() for i in best}
    return g, (None if g is None else routes), e, weights


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("owned", [None, [[0, 7, 3], [1, 2, 7], [4, 5, 6]]])
def test_router_by_the_algorithm(variant, owned):
    keep, taus = (2, (0.7, 1.6))
    options = dict(num_routes=3 if owned else 4, active_routes=keep, route_experts=owned)
    module = router(variant, scene_temperature=taus[0], temperature=taus[1], **options)
    owned = owned or [[0, 1], [2, 3], [4, 5], [6, 7]]
    x, scene = draw()
    result = module(x, scene)
    assert result.expert_ids.dtype == torch.int32
    for t in range(35):
        query = x[t // 7, t % 7], scene[t // 7]
        g, routes, e, weights = by_the_algorithm(module, *query, owned, keep, taus)
        torch.testing.assert_close(result.probs[t], e)
        assert result.expert_ids[t].tolist() == list(weights)
        assert result.gates[t].tolist() == pytest.approx(list(weights.values()), abs=1e-5)
        if g is None:
            assert result.scene_probs is None and result.scene_routes is None
        else:
            torch.testing.assert_close(result.scene_probs[t], g)
            assert result.scene_routes[t].tolist() == routes
    torch.testing.assert_close(result.gates.sum(1), torch.ones(35))


def test_a_scene_has_its_experts():
    x, scene = draw(images=9, tokens=30)
    for variant, most in (("full", 4), ("scene", 2)):
        ids = router(variant)(x, scene).expert_ids.unflatten(0, (9, 30))
        used = [image.unique() for image in ids]
        assert max(map(len, used)) <= most and ids.unique().numel() > most
    assert len(router("full")(x, scene).expert_ids[:30].unique()) > 2, "queries differ"


def test_fp32_inside_autocast():
    module, (x, scene) = router(), draw()
    exact = module(x, scene)
    with torch.autocast("cpu", torch.bfloat16):
        result = module(x, scene)
    assert torch.equal(result.expert_ids, exact.expert_ids)
    assert torch.equal(result.probs, exact.probs) and result.gates.dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_both_routers(ffn, variant):
    moe = MoEFeedForward(ffn.dim, ffn.hidden, router=router(variant))
    x, scene = draw()
    scene.requires_grad_()
    y, _ = moe(x, scene)
    (y * torch.randn_like(y)).sum().backward()
    parameters = dict(moe.router.named_parameters())
    assert parameters.keys() == {"weight"} | (set() if variant == "instance" else {"scene_weight"})
    for parameter in parameters.values():
        assert parameter.grad.abs().max() > 0
    assert (scene.grad is not None) == (variant != "instance")


@pytest.mark.parametrize("variant", ["full", "scene"])
def test_a_shared_scene_router_is_the_router_s_own_computed_once(variant):
    own = router(variant, scene_temperature=0.7)
    shared = router(variant, shared_scene=True)
    shared.weight = own.weight
    one = SceneRouter(12, 4, temperature=0.7)
    one.weight = own.scene_weight
    x, scene = draw()
    expected, found = own(x, scene), shared(x, one(scene))
    assert torch.equal(found.expert_ids, expected.expert_ids)
    assert torch.equal(found.gates, expected.gates) and torch.equal(found.probs, expected.probs)
    assert torch.equal(found.scene_routes, expected.scene_routes)
    static = StaticHierarchy(shared)
    ids, gates = static(x, one(scene))
    assert torch.equal(ids.int(), found.expert_ids)
    torch.testing.assert_close(gates, found.gates)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_whole_copies_are_the_dense_ffn(ffn, k):
    x, scene = draw()
    for variant in VARIANTS:
        moe = MoEFeedForward(ffn.dim, ffn.hidden, router=router(variant, top_k=k))
        drawn = copy.deepcopy(moe.router.state_dict())
        assert not any(moe.load_state_dict(ffn.state))
        torch.testing.assert_close(moe.router.state_dict(), drawn, rtol=0, atol=0)
        y, routing = moe(x, scene)
        torch.testing.assert_close(y, ffn.module(x)[0], rtol=1e-4, atol=1e-4)
        assert routing.parts == 1 and len(routing.expert_ids.unique()) > k
        assert ("moe/layer0/siblings" in training_metrics([routing])) == (k == 1)


@pytest.mark.parametrize("model", ["nano", "edge"])
def test_tuned_detector_equals_dense(model, request):
    dense = request.getfixturevalue(model)
    dim = dense.config.decoder.layer.ffn.dim
    node = L(HierarchicalRouter)(dim=dim, num_experts=8, top_k=2, std=1.0)
    for variant in VARIANTS:
        moe = dense.with_experts(router={**node, "variant": variant})
        output = dense.decode(moe)
        for a, b in zip(dense.output.layers, output.layers, strict=True):
            assert a.boxes.std((0, 1)).min() > 0.01
            torch.testing.assert_close(a.boxes, b.boxes, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=1e-3)
        if variant != "scene":  # two scenes may choose alike
            assert any(len(r.expert_ids.unique()) > 2 for r in output.routings)
        if variant != "instance":
            queries = output.layers[0].boxes.shape[1]
            probs = output.routings[0].scene_probs.unflatten(0, (2, queries))
            assert (probs == probs[:, :1]).all() and (probs[0] != probs[1]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(variant="flat"), "variant 'flat': choose one of full, instance, scene"),
        (dict(top_k=9), "top_k=9 must lie between 1 and num_experts=8"),
        (dict(temperature=0.0), "temperature=0.0 must be positive"),
        (dict(num_routes=3), "num_experts=8 can't be shared evenly by num_routes=3"),
        (dict(active_routes=5), "active_routes=5 must lie between 1 and num_routes=4"),
        (dict(top_k=4, active_routes=1), "top_k=4, but 1 routes may give a pool of only 2"),
        (dict(num_routes=2, route_experts=[[0, 1], [2]]), r"experts \[0, 1, 2\] for 2 routes"),
        (dict(route_experts=[list(range(8))]), "for 1 routes; .* num_routes=4"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        router(**{"variant": "full", **options})


def test_a_scene_is_needed():
    x, _ = draw()
    with pytest.raises(ValueError, match="needs the scene.*variant='instance'"):
        router()(x)
    assert router("instance")(x).expert_ids.shape == (35, 2)


# Losses ------------------------------------------------------------------------------------------
def test_squared_balance_by_the_formula():
    modules = [router(), router("instance", num_experts=4)]
    x, scene = draw()
    routings = [module(x, scene) for module in modules]
    terms = []
    for routing in routings:
        f = [(routing.expert_ids == e).sum() / 70 for e in range(routing.num_experts)]
        terms.append(sum((share - 1 / len(f)) ** 2 for share in f))
    loss = SquaredBalanceLoss(0.3)(routings)
    torch.testing.assert_close(loss, 0.3 * sum(terms) / 2)
    loss.backward()
    # The gradient is that of the mean probability
    twin = copy.deepcopy(modules[0])
    twin.zero_grad()
    routing = twin(x, scene)
    slope = 0.3 / 2 * 2 * (expert_load(routing) - 1 / 8)
    (routing.probs.mean(0) * slope).sum().backward()
    torch.testing.assert_close(modules[0].weight.grad, twin.weight.grad)
    torch.testing.assert_close(modules[0].scene_weight.grad, twin.scene_weight.grad)
    assert twin.scene_weight.grad.abs().max() > 0


def expected_mean_output(experts: Experts, x, ids, e: int):
    mine = x[(ids == e).any(1)]
    return ((mine @ experts.w1[e].T + experts.b1[e]).relu() @ experts.w2[e].T).mean(0) + (
        experts.b2[e]
    )


def test_responses_by_the_formula():
    experts, x = Experts(6, 10, 5), torch.randn(20, 6, requires_grad=True)
    ids = torch.stack([torch.randperm(3)[:2] for _ in range(20)]).int()  # 3 and 4 have no token
    ids[4, 1] = ids[5, 0] = -1
    routing = Routing(ids, torch.rand(20, 2), torch.rand(20, 5))
    result = experts.mean_outputs(x, routing, 20)
    for e in range(3):
        torch.testing.assert_close(result[e], expected_mean_output(experts, x, ids, e))
    assert (result[3:] == 0).all()
    result.sum().backward()
    assert x.grad is None and (experts.w2.grad[:3] != 0).any() and (experts.w1.grad[3:] == 0).all()
    # Of more tokens than are asked for, some that are spread evenly
    ids = torch.zeros(20, 1, dtype=torch.int32)
    result = experts.mean_outputs(x, Routing(ids, ids + 1.0, torch.rand(20, 5)), 4)
    torch.testing.assert_close(result[0], expected_mean_output(experts, x[::5], ids[::5], 0))
    none = torch.full((20, 2), -1, dtype=torch.int32)
    assert (experts.mean_outputs(x, Routing(none, none * 0.0, torch.rand(20, 5)), 4) == 0).all()


def with_mean_outputs(mean_outputs, ids) -> Routing:
    ids = torch.tensor(ids, dtype=torch.int32)[:, None]
    return Routing(
        ids, ids + 1.0, torch.rand(len(ids), len(mean_outputs)), mean_outputs=mean_outputs
    )


def test_diversity_by_the_formula():
    mean_outputs = torch.randn(4, 6, requires_grad=True)
    p = mean_outputs.softmax(1)[[0, 2, 3]]  # expert 1 has no token
    mean = p.mean(0)
    divergence = sum((row * (row / mean).log()).sum() for row in p) / 3  # of each to the mean
    loss = DiversityLoss(0.5)([with_mean_outputs(mean_outputs, [0, 2, 3, 3])])
    torch.testing.assert_close(loss, 0.5 * (torch.tensor(3.0).log() - divergence))
    loss.backward()
    assert (mean_outputs.grad[1] == 0).all() and (mean_outputs.grad[[0, 2, 3]] != 0).any()


def test_diversity_at_its_ends():
    alike, apart = torch.ones(3, 5), 100 * torch.eye(3, 5)
    values = [DiversityLoss(1.0)([with_mean_outputs(r, [0, 1, 2])]).item() for r in (alike, apart)]
    assert values == pytest.approx([torch.tensor(3.0).log().item(), 0], abs=1e-5)
    far = (1e4 * torch.eye(3, 5)).requires_grad_()
    DiversityLoss()([with_mean_outputs(far, [0, 1, 2])]).backward()
    assert far.grad.isfinite().all()
    lone = DiversityLoss(1.0)([with_mean_outputs(apart, [1])])
    assert lone.item() == pytest.approx(0, abs=1e-6), "one expert has nobody to differ from"
    with pytest.raises(ValueError, match="set response_tokens"):
        DiversityLoss()([router()(*draw())])


def test_a_layer_reports_responses_in_training(ffn):
    moe = MoEFeedForward(ffn.dim, ffn.hidden, router=router(), response_tokens=50)
    for parameter in moe.experts.parameters():
        nn.init.normal_(parameter)
    x, scene = draw()
    _, routing = moe(x, scene)
    for e in routing.expert_ids.unique():
        want = expected_mean_output(moe.experts, x.flatten(0, 1), routing.expert_ids, int(e))
        torch.testing.assert_close(routing.mean_outputs[e], want, rtol=1e-4, atol=1e-4)
    DiversityLoss()([routing.slice_tokens(5, 3)]).backward()
    assert (moe.experts.w1.grad != 0).any()
    assert moe.eval()(x, scene)[1].mean_outputs is None
