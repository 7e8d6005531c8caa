"""MoE-Tuning: loading a dense checkpoint makes a mixture of experts that computes the same."""

import copy
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from dynamic_dino.checkpoint.weights import export_weights, load_checkpoint
from dynamic_dino.config import load_config
from dynamic_dino.modeling.feed_forward import FeedForward
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.losses import LoadBalanceLoss
from dynamic_dino.moe.routers import GATES, SoftmaxRouter
from torch import nn

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = [(4, 1), (4, 4), (8, 2), (16, 1), (16, 2), (16, 4)]  # experts, k


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |a|, over what is finite, which must be the same places"""
    a, b = a.detach(), b.detach()
    finite = a.isfinite()
    assert torch.equal(finite, b.isfinite()) and torch.equal(a[~finite], b[~finite])
    return float((a[finite] - b[finite]).abs().max() / a[finite].abs().max())


def assert_same_predictions(one, other, tolerance: float = 1e-4):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.boxes.std((0, 1)).min() > 0.01, "the boxes are alike, so this shows nothing"
        assert relative_difference(a.logits, b.logits) <= tolerance
        assert relative_difference(a.boxes, b.boxes) <= tolerance


def assert_whole_copies(routings, k: int):
    """Every token's experts are the k parts of one copy of the dense FFN."""
    for routing in routings:
        ids = routing.expert_ids.long().sort(1).values
        assert torch.equal(ids, ids[:, :1] // k * k + torch.arange(k))


# A converted detector equals the dense one -------------------------------------------------------
@pytest.mark.parametrize(("num_experts", "k"), SIZES)
def test_converted_model_equals_dense(dense, num_experts, k):
    for gate in GATES:
        moe = dense.with_experts(num_experts=num_experts, top_k=k, gate=gate)
        output = dense.decode(moe)
        assert_same_predictions(dense.output.layers, output.layers)
        layers = len(moe.decoder.layers)
        assert len(output.routings) == layers
        assert_whole_copies(output.routings, k)
        used = {int(i) for r in output.routings for i in r.expert_ids.flatten()}
        assert num_experts == k or len(used) > k, "some choice should have been made"
    with torch.autocast("cpu", torch.bfloat16):
        rounded = dense.decode(moe)
    assert rounded.routings[0].probs.dtype == torch.float32
    assert_whole_copies(rounded.routings, k)


def test_experts_in_the_enhancer(dense):
    """Table 9. Rounding may exchange two queries of almost the same score, so all are alike."""
    source = copy.copy(dense)
    source.model = copy.deepcopy(dense.model)
    selection = source.model.query_selection
    selection.num_queries = 336
    selection.content = nn.Embedding(1, 256)
    selection.content.weight.data = torch.randn(1, 256).expand(336, -1).clone()
    before = source.decode(source.model)
    moe = source.with_experts(enhancer=True, num_experts=8, top_k=2)
    after = source.decode(moe)

    assert len(after.routings) == len(moe.enhancer.layers) + len(moe.decoder.layers)
    cells = dense.masks["p5"].numel()
    assert [len(r.probs) for r in after.routings[: len(moe.enhancer.layers)]] == (
        [cells] * len(moe.enhancer.layers)
    )
    assert_whole_copies(after.routings, 2)
    order = torch.cdist(before.selection.boxes, after.selection.boxes, p=1).argmin(-1)
    assert all(len(row.unique()) == 336 for row in order)
    for p in after.layers:
        p.logits = p.logits.gather(1, order[..., None].expand_as(p.logits))
        p.boxes = p.boxes.gather(1, order[..., None].expand_as(p.boxes))
    assert_same_predictions(before.layers, after.layers)


def test_conversion_is_sensitive(dense):
    """What the comparison above sees: one part's bias not divided, one part missing."""
    moe = dense.with_experts(num_experts=4, top_k=2)
    for name in ("b2", "w1"):
        wrong = copy.deepcopy(moe)
        experts = wrong.decoder.layers[0].ffn.experts
        getattr(experts, name).data[::2] *= 2 if name == "b2" else 0
        with pytest.raises(AssertionError):
            assert_same_predictions(dense.output.layers, dense.decode(wrong).layers)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_recipe_converts_a_dense_checkpoint(nano, tmp_path, suffix):
    path = tmp_path / f"dense{suffix}"
    model = nano.model
    if suffix == ".pth":
        torch.save({"model": model.state_dict(), "iteration": 3}, path)
    else:
        export_weights(model, path)
        model = copy.deepcopy(model)
        load_checkpoint(model, path)  # the weights as fp16 keeps them
    config = load_config(CONFIGS / "moe_tuning/nano_x16_drawn.py").model
    config.query_selection.num_queries = nano.config.query_selection.num_queries
    moe = instantiate(config).eval()
    assert all(layer.ffn.router.num_experts == 16 for layer in moe.decoder.layers)
    load_checkpoint(moe, path)
    output = nano.decode(moe)
    assert_same_predictions(nano.decode(model).layers, output.layers)
    assert_whole_copies(output.routings, 2)
    # End to end too
    with torch.no_grad():
        before, after = model(nano.batch), moe(nano.batch)
    for a, b in zip(before, after, strict=True):
        a, b = a["instances"], b["instances"]
        assert relative_difference(a.scores, b.scores) <= 1e-4


def test_training_a_converted_model(nano):
    """The first losses are the dense model's; the router gets its gradient and its metrics."""
    from detectron2.structures import Boxes, Instances

    batch = []
    for sample in nano.batch:
        instances = Instances(sample["image_size"])
        instances.gt_boxes = Boxes(torch.tensor([[5.0, 10, 80, 60], [40, 50, 90, 95]]))
        instances.gt_classes = torch.tensor([1, 0])
        batch.append({**sample, "instances": instances})
    moe = nano.with_experts(num_experts=8, top_k=2)
    moe.criterion = copy.deepcopy(moe.criterion)
    moe.criterion.router_losses = (LoadBalanceLoss(0.01),)
    losses = []
    for model in (nano.model, moe):
        torch.manual_seed(0)
        losses.append(model.train()(batch))
        model.eval()
    dense, moe_losses = losses
    for name, value in dense.items():
        torch.testing.assert_close(moe_losses.pop(name), value, rtol=1e-4, atol=1e-4)
    balance = moe_losses.pop("loss_load_balance")
    assert 0.0099 < balance < 0.05 and balance.requires_grad
    assert len(moe_losses.pop("routings")) == 3
    metrics = "load_entropy load_max dead_experts router_entropy siblings same_part".split()
    assert moe_losses.keys() == {f"moe/layer{i}/{m}" for i in range(3) for m in metrics}
    assert not any(v.requires_grad for v in moe_losses.values())
    assert all(moe_losses[f"moe/layer{i}/siblings"] == 1 for i in range(3))


# The layer ---------------------------------------------------------------------------------------
def layer(
    ffn, num_experts=8, top_k=2, gate="indicator", tied=True, load=True, **options
) -> MoEFeedForward:
    router = SoftmaxRouter(ffn.dim, num_experts, top_k, gate, tied)
    moe = MoEFeedForward(ffn.dim, ffn.hidden, router, **options)
    if load:
        assert not any(moe.load_state_dict(ffn.state))
    return moe


def tokens(ffn, batch=3, count=11):
    return torch.randn(batch, count, ffn.dim)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_layer_equals_ffn(ffn, activation):
    ffn.module.activation = activation
    x = tokens(ffn)
    for k in (1, 2, 3, 4, 24):
        moe = layer(ffn, 48, k, activation=activation)
        y, routing = moe(x)
        assert relative_difference(ffn.module(x)[0], y) < 1e-5
        assert y.shape == x.shape and len(routing.probs) == 33


def test_any_copy_is_the_whole_ffn(ffn):
    """By the definition: the k parts of every copy add up to the FFN."""
    moe = layer(ffn, 12, 4)
    x, e = tokens(ffn).flatten(0, 1), moe.experts
    for copy_ in range(3):
        y = 0
        for part in range(4):
            i = 4 * copy_ + part
            y = y + (x @ e.w1[i].T + e.b1[i]).relu() @ e.w2[i].T + e.b2[i]
        assert relative_difference(ffn.module(x)[0], y) < 1e-5
    assert not torch.equal(e.w1[0], e.w1[1]) and torch.equal(e.w1[0], e.w1[4])
    # copies are copies: they can part in training
    e.w1.data[0] += 1
    assert not torch.equal(e.w1[0], e.w1[4])


def test_moe_checkpoint_loads_unchanged(ffn):
    source = layer(ffn, load=False)
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    target = layer(ffn)
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)
    assert set(source.state_dict()) == {
        "router.weight",
        *(f"experts.{name}" for name in ("w1", "b1", "w2", "b2")),
    }


def test_loading_leaves_the_dense_state_alone(ffn):
    model = nn.ModuleDict({"ffn": layer(ffn, load=False)})
    state = {f"ffn.{k}": v.clone() for k, v in ffn.state.items()}
    model.load_state_dict(state)
    assert state.keys() == {f"ffn.{k}" for k in ffn.state}
    assert all(torch.equal(state[f"ffn.{k}"], v) for k, v in ffn.state.items())
    model["ffn"].experts.w1.data.zero_()
    assert all(torch.equal(state[f"ffn.{k}"], v) for k, v in ffn.state.items())


def test_loading_keeps_the_router(ffn):
    moe = layer(ffn, load=False)
    router = moe.router.weight.clone()
    moe.load_state_dict(ffn.state)
    assert torch.equal(moe.router.weight, router) and moe.router.weight.requires_grad


def test_without_init_experts(ffn):
    moe = layer(ffn, load=False, init_experts=False)
    drawn = {k: v.clone() for k, v in moe.state_dict().items()}
    assert not any(moe.load_state_dict(ffn.state))
    torch.testing.assert_close(moe.state_dict(), drawn, rtol=0, atol=0)
    x = tokens(ffn)
    y, routing = moe(x)
    assert (y - ffn.module(x)[0]).abs().max() > 0.1
    assert_whole_copies([routing], 2)
    assert len(moe.experts.w1.flatten(1).unique(dim=0)) == 8, "every expert is drawn by itself"


def test_rows_drawn_apart(ffn):
    moe = layer(ffn, tied=False, num_experts=16)
    assert len(moe.router.weight.unique(dim=0)) == 16
    torch.testing.assert_close(moe.experts.w1[0], ffn.state["linear1.weight"][:12])
    x = torch.randn(1, 200, ffn.dim)
    y, routing = moe(x)
    with pytest.raises(AssertionError):
        assert_whole_copies([routing], 2)
    assert (y - ffn.module(x)[0]).abs().max() > 0.1
    groups = layer(ffn, num_experts=16).router.weight
    assert torch.equal(groups[0::2], groups[1::2]) and len(groups.unique(dim=0)) == 8


def test_backends_agree(ffn):
    x = tokens(ffn)
    results = []
    for backend in ("sequential", "grouped"):
        torch.manual_seed(0)
        moe = layer(ffn, gate="renormalized", tied=False, backend=backend)
        inputs = x.clone().requires_grad_()
        y, _ = moe(inputs)
        y.square().sum().backward()
        results.append([y, inputs.grad, *(p.grad for p in moe.parameters())])
    for a, b in zip(*results, strict=True):
        assert relative_difference(a, b) < 1e-4


# Errors ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(top_k=3, num_experts=6), "top_k=3 doesn't divide .* hidden size 16.* 1, 2 or 4"),
        (dict(top_k=0), "top_k=0"),
        (dict(top_k=4, num_experts=6), "num_experts=6 is not a multiple of top_k=4"),
        (dict(top_k=4, num_experts=2), "top_k=4 must lie between 1 and num_experts=2"),
        (dict(num_experts=0), "top_k=2 must lie between 1 and num_experts=0"),
        (dict(gate="hard"), "gate 'hard': choose one of indicator, renormalized, straight_through"),
    ],
)
def test_impossible_combinations(options, message):
    with pytest.raises(ValueError, match=message):
        MoEFeedForward(8, 16, SoftmaxRouter(8, **options))


def test_dense_ffn_of_another_size(ffn):
    model = nn.Sequential(MoEFeedForward(ffn.dim, 32, SoftmaxRouter(ffn.dim, 4)))
    with pytest.raises(ValueError, match="0.linear1.weight has 24 hidden units.* FFN 32: .*archit"):
        model.load_state_dict({f"0.{k}": v for k, v in ffn.state.items()})


def test_mixtures_of_other_sizes(ffn):
    moe = layer(ffn, 8, 2)
    with pytest.raises(RuntimeError, match="size mismatch for experts.w1"):
        layer(ffn, 4, 2).load_state_dict(moe.state_dict())
    with pytest.raises(RuntimeError, match="(?s)Missing.*linear1.*Unexpected.*experts"):
        FeedForward(ffn.dim, ffn.hidden).load_state_dict(moe.state_dict())
    part = {k: v for k, v in ffn.state.items() if k != "linear2.bias"}
    with pytest.raises(RuntimeError, match="(?s)Missing.*experts.w1.*Unexpected.*linear1.weight"):
        layer(ffn, load=False).load_state_dict(part)


# Gradients ---------------------------------------------------------------------------------------
def router_gradient(moe, x, detection: bool, balance: bool) -> torch.Tensor | None:
    moe.zero_grad(set_to_none=True)
    y, routing = moe(x)
    loss = (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))).sum() * detection
    if balance:
        loss = loss + LoadBalanceLoss(1.0)([routing])
    loss.backward()
    return moe.router.weight.grad


@pytest.mark.parametrize("k", [2, 4])
def test_indicator_never_parts_siblings(ffn, k):
    moe = layer(ffn, 4 * k, k, gate="indicator")
    x = tokens(ffn, count=40)
    assert router_gradient(moe, x, detection=True, balance=False) is None
    balance = router_gradient(moe, x, detection=True, balance=True)
    assert balance.abs().max() > 1e-5
    siblings = balance.view(4, k, -1)
    assert relative_difference(siblings, siblings[:, :1].expand_as(siblings)) < 1e-5


@pytest.mark.parametrize("k", [2, 4])
def test_soft_gates_part_siblings(ffn, k):
    x = tokens(ffn, count=40)
    gradients = []
    for gate in ("straight_through", "renormalized"):
        torch.manual_seed(0)
        moe = layer(ffn, 4 * k, k, gate=gate)
        gradient = router_gradient(moe, x, detection=True, balance=False)
        assert gradient is not None
        siblings = gradient.view(4, k, -1)
        used = siblings[siblings.abs().amax((1, 2)) > 0]
        assert len(used) > 1
        assert ((used[:, 1:] - used[:, :1]).abs().amax((1, 2)) > 0.1 * used.abs().max()).any()
        gradients.append(gradient)
    # At the start both gates are one, so that both have the same gradient.
    assert relative_difference(*gradients) < 1e-4


def test_gates_differ_once_siblings_part(ffn):
    x = tokens(ffn)
    outputs = {}
    for gate in GATES:
        moe = layer(ffn, gate=gate)
        with torch.no_grad():
            torch.manual_seed(1)
            moe.router.weight.normal_()
        outputs[gate], routing = moe(x)
        if gate == "indicator":
            assert routing.gates is None  # all are one
            continue
        even = torch.ones_like(routing.gates)
        assert torch.equal(routing.gates, even) == (gate != "renormalized")
        torch.testing.assert_close(routing.gates.sum(1), even.sum(1))
    torch.testing.assert_close(outputs["indicator"], outputs["straight_through"])
    assert (outputs["indicator"] - outputs["renormalized"]).abs().max() > 0.1
