"""The config.yaml of a run by an older version builds the model that it was written for."""

from pathlib import Path

import pytest
from detectron2.config import LazyConfig, instantiate
from dynamic_dino.config import load_config
from dynamic_dino.renamed import current, current_nodes

CONFIGS = Path(__file__).parents[2] / "configs"
# Written when modules had other places, and the layer of experts its router's arguments.
OLD = Path(__file__).with_name("config_of_an_older_version.yaml")
ROUTER = "model.decoder.layer.ffn.router"


def test_config_of_an_older_version(tmp_path):
    found = load_config(OLD)
    options = ("num_experts=8", "gate=straight_through", "tied=false", "std=0.1")
    same = load_config(
        CONFIGS / "moe_tuning/nano_x16_drawn.py",
        [*(f"{ROUTER}.{option}" for option in options), "train.output_dir=output/x8"],
    )
    LazyConfig.save(same, str(tmp_path / "config.yaml"))
    same = load_config(tmp_path / "config.yaml")
    assert found.model.decoder.layer.ffn == same.model.decoder.layer.ffn
    assert found.train == same.train and found.dataloader.keys() == same.dataloader.keys()

    models = [instantiate(cfg.model) for cfg in (found, same)]
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    router = models[0].decoder.layers[0].ffn.router
    assert (router.num_experts, router.top_k, router.parts, router.tied) == (8, 2, 2, False)
    assert router.gate == "straight_through" and router.std == 0.1


def test_arguments_of_older_versions():
    layer = {"_target_": "dynamic_dino.moe.layer.MoEFeedForward", "dim": 8, "hidden": 16}
    softmax = {"_target_": "dynamic_dino.moe.routers.SoftmaxRouter", "dim": 8}
    given = {"_target_": "dynamic_dino.moe.top_any.TopAnyRouter", "dim": 8, "num_experts": 4}
    for old, router in (
        ({}, softmax),  # the defaults are what they were
        ({"top_k": 4, "num_experts": None, "router": None}, softmax | {"top_k": 4}),
        ({"router": given, "num_experts": 4, "gate": "indicator"}, given),
        ({"router": given}, given),
    ):
        (found,) = current_nodes([layer | old | {"backend": "grouped"}])
        assert found == layer | {"router": router, "backend": "grouped"}
        assert current_nodes(found) == found
    backbone = {"_target_": "dynamic_dino.modeling.backbone.Backbone", "name": "resnet50"}
    found = current_nodes({"model": {"backbone": backbone | {"frozen_parts": ["conv1"]}}})
    assert found == {"model": {"backbone": backbone | {"frozen_modules": ["conv1"]}}}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("dynamic_dino.text.TextEncoder", "dynamic_dino.modeling.text.TextEncoder"),
        ("dynamic_dino.moe.layer.MoEFeedForward", "dynamic_dino.moe.layer.MoEFeedForward"),
        ("output/dynamic_dino.text", "output/dynamic_dino.text"),
    ],
)
def test_paths(old, new):
    assert current(f"- {{_target_: {old}, x: 1}}") == f"- {{_target_: {new}, x: 1}}"
