"""A model without an expert, against a model whose experts are masked by hand."""

import copy

import numpy as np
import pytest
import torch
from dynamic_dino.analysis.collect import collect
from dynamic_dino.analysis.drop import drop_experts, without_experts
from dynamic_dino.analysis.expert_ap import subset_ap
from dynamic_dino.analysis.images import loader_of
from dynamic_dino.analysis.layers import moe_layers
from dynamic_dino.analysis.objects import objects_of
from dynamic_dino.moe.routers import Router, SoftmaxRouter
from dynamic_dino.moe.routing import Routing


class ByHand(Router):
    """Chooses among some experts only, token by token."""

    def __init__(self, router, allowed):
        super().__init__()
        self.weight, self.allowed = router.weight, allowed
        self.num_experts, self.top_k = router.num_experts, router.top_k

    def forward(self, tokens, scene=None):
        logits = (tokens.flatten(0, 1).double() @ self.weight.double().T).float()
        rows = [sorted(self.allowed, key=lambda e: (-row[e], e))[:2] for row in logits.tolist()]
        ids = torch.tensor(rows, dtype=torch.int32)
        return Routing(ids, torch.ones(ids.shape), logits.softmax(-1))


@pytest.fixture
def loader(x4):
    return loader_of(x4[1], "drawn_val", "all", 6, batch_size=3)


def ap_of(collection):
    objects = objects_of(collection)
    everything = np.ones(len(collection.predictions), bool), np.ones(len(objects), bool)
    return subset_ap(collection, objects, *everything)[0]


@pytest.mark.slow
def test_every_expert_of_a_layer(x4, loader):
    model, _ = x4
    reference, drops = drop_experts(model, loader, "drawn_val", ["decoder 1"])
    assert [(drop.layer, drop.expert) for drop in drops] == [("decoder 1", e) for e in range(4)]
    whole = collect(model, loader(), "drawn_val", "")
    assert reference == ap_of(whole)
    loads = whole.layers[1].load / whole.layers[1].load.sum()
    for expert, drop in enumerate(drops):
        masked = copy.deepcopy(model)
        layer = masked.decoder.layers[1].ffn
        layer.router = ByHand(layer.router, [e for e in range(4) if e != expert])
        found = collect(masked, loader(), "drawn_val", "")
        with without_experts(model, "decoder 1", [expert]):
            ours = collect(model, loader(), "drawn_val", "")
        assert ours.layers[1].load[expert] == 0
        for mine, its in zip(ours.layers, found.layers, strict=True):
            assert mine.load.tolist() == its.load.tolist()
        np.testing.assert_array_equal(ours.predictions.boxes, found.predictions.boxes)
        np.testing.assert_array_equal(ours.predictions.scores, found.predictions.scores)
        assert drop.ap == ap_of(found) and drop.load == pytest.approx(loads[expert])
        assert drop.change["all"] == drop.ap["all"] - reference["all"]
    again = collect(model, loader(), "drawn_val", "")  # the model is as it was
    np.testing.assert_array_equal(again.predictions.scores, whole.predictions.scores)
    assert all(layer.router.dropped == () for layer in moe_layers(model).values())


def test_a_router_that_does_not_heed(x4, loader):
    class Deaf(SoftmaxRouter):
        def masked(self, device):
            return None

    model = copy.deepcopy(x4[0])
    router = model.decoder.layers[2].ffn.router
    router.__class__ = Deaf
    with pytest.raises(ValueError, match="Deaf gave expert . to .* tokens although"):
        drop_experts(model, loader, "drawn_val", ["decoder 2"])
    assert router.dropped == ()
