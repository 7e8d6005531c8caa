"""The static forms of experts compute what `MoEFeedForward` does."""

import pytest
import torch
from dynamic_dino.export.experts import EXPERTS, StaticMoE, StaticSoftmax
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.routers import Router, SoftmaxRouter
from helpers.routers import DIM, ROUTERS
from helpers.seeds import examples
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("kind", ROUTERS)
@settings(max_examples=examples(6), deadline=None)
@given(
    experts=st.integers(1, 4),
    k=st.sampled_from([1, 2, 4]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 80)),
    activation=st.sampled_from(["relu", "gelu"]),
    seed=st.integers(0, 999),
)
def test_a_static_layer_equals_the_layer(kind, experts, k, shape, activation, seed):
    torch.manual_seed(seed)
    layer = MoEFeedForward(DIM, 16, ROUTERS[kind](experts, k), activation).eval()
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.normal_()
        if kind == "top-any":
            layer.router.thresholds.normal_(std=0.5)
        if kind == "parts":
            layer.router.weight.normal_()
        x, scene = torch.randn(*shape, DIM), torch.randn(shape[0], DIM)
        norm = torch.nn.LayerNorm(DIM)
        expected = layer(x, scene, norm)[0]
        for form in EXPERTS:
            y, routing = StaticMoE(layer, form)(x, scene, norm)
            torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4, msg=form)
            assert routing is None


def test_siblings_are_merged_while_their_rows_are_equal():
    layer = MoEFeedForward(DIM, 16, SoftmaxRouter(DIM, 8, 2))
    merged = StaticMoE(layer, "sparse")
    assert [len(weights) for weights in merged.experts.weights] == [4] * 4
    assert merged.experts.weights[0][0].shape == (16, DIM)
    with torch.no_grad():
        layer.router.weight[0] += 1e-3
    apart = StaticMoE(layer, "sparse")
    assert len(apart.experts.weights[0]) == 8 and isinstance(apart.router, StaticSoftmax)


def test_what_has_no_static_form_is_said():
    class Mine(Router):
        num_experts = top_k = 2

    with pytest.raises(ValueError, match="router Mine has no static form.*PartRouter"):
        StaticMoE(MoEFeedForward(DIM, 16, Mine()), "all")
    layer = MoEFeedForward(DIM, 16, SoftmaxRouter(DIM, 4, 2))
    layer.router.drop(1)
    with pytest.raises(ValueError, match=r"experts \(1,\).*router.drop\(\)"):
        StaticMoE(layer, "all")
