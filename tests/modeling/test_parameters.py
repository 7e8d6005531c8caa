"""The sizes that the papers state: Dynamic-DINO's Table 8. Built on the meta device."""

from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from dynamic_dino.config import load_config
from dynamic_dino.moe.parameters import count_parameters

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = {
    "pretrain/gdino15_edge_7ep.py": 178,
    "moe_tuning/dynamic_dino_x4_top2.py": 184,
    "moe_tuning/dynamic_dino_x8_top2.py": 197,
    "moe_tuning/dynamic_dino_x16_top2.py": 222,
}


def millions(module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.fixture(scope="module")
def towers():
    """Edge's towers, of the right sizes, without weights."""
    random = LazyConfig.load(str(CONFIGS / "common/models/edge_random.py")).model
    with torch.device("meta"):
        return {name: instantiate(random[name]) for name in ("backbone", "text_encoder")}


@pytest.fixture(scope="module")
def models(towers):
    models = {}
    with torch.device("meta"):
        for recipe in RECIPES:
            node = load_config(CONFIGS / recipe).model
            assert node.text_encoder.model == "bert-base-uncased"
            models[recipe] = instantiate({**node, **towers})
    return models


@pytest.mark.parametrize(("recipe", "size"), RECIPES.items())
def test_total(models, recipe, size):
    counts = count_parameters(models[recipe])
    assert counts["total"] / 1e6 == pytest.approx(millions(models[recipe]))
    assert counts["total"] / 1e6 == pytest.approx(size, abs=1)
    assert counts["trainable"] == counts["total"]


@pytest.mark.parametrize("recipe", list(RECIPES)[1:])
def test_active_is_as_much_as_dense(models, recipe):
    dense = count_parameters(models["pretrain/gdino15_edge_7ep.py"])
    assert dense["active"] == dense["total"]
    assert count_parameters(models[recipe])["active"] == pytest.approx(dense["total"], abs=1e6)


@pytest.mark.parametrize(
    ("recipe", "size"),
    {
        "pretrain/dino_r50_coco_12ep.py": 47,  # DINO's code prints 47M; HI-MoE's Table 3 says 50M
        "pretrain/dino_r50_coco_50ep.py": 47,
        "himoe/dino.py:small_experts": 49,  # Table 3: 2M more
        "himoe/dino.py": 47 + 15 * 6 * 1.051,  # the other reading: 16 whole FFNs
        "himoe/dino.py:x8_top2": 47 + 7 * 6 * 1.051,
        "himoe/dino.py:x4_top2": 47 + 3 * 6 * 1.051,
        "himoe/dino_encoder_decoder.py": 47 + 15 * 12 * 1.051,
    }.items(),
)
def test_closed_set(recipe, size):
    node = load_config(CONFIGS / recipe).model
    assert node.backbone.name == "resnet50.tv_in1k" and node.backbone.weights == "timm"
    node.backbone.weights = None
    with torch.device("meta"):
        model = instantiate(node)
    assert millions(model) == pytest.approx(size, abs=0.5)
    assert model.decoder.class_head.linear.out_features == len(model.text_encoder.names) == 80
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert all(n.startswith("backbone.") for n in frozen)
    parts = ("conv1", "layer1", "bn", "downsample.1")  # the norm of a shortcut
    assert all(any(part in n for part in parts) for n in frozen)


def test_towers(towers):
    assert millions(towers["backbone"]) == pytest.approx(38.0, abs=0.1)
    assert millions(towers["text_encoder"].body) == pytest.approx(109, abs=0.6)
    assert towers["backbone"].channels == [128, 256, 512]


def test_experts_by_hand(models):
    """Six layers; an expert of 1024 units has both matrices, both biases; a router 256 each."""
    expert = 2 * 256 * 1024 + 1024 + 256
    dense_ffn = 2 * 256 * 2048 + 2048 + 256
    dense = count_parameters(models["pretrain/gdino15_edge_7ep.py"])["total"]
    for experts in (4, 8, 16):
        total = count_parameters(models[f"moe_tuning/dynamic_dino_x{experts}_top2.py"])["total"]
        assert total - dense == 6 * (experts * (expert + 256) - dense_ffn)
