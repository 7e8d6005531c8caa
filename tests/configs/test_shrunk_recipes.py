"""Every recipe's detector at a size for tests: a training step, and an evaluation."""

import copy
import functools
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, Instances
from dynamic_dino.config import load_config
from dynamic_dino.engine.optim import build_optimizer
from dynamic_dino.engine.trainable import set_train_mode, set_trainable
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.moe.adaptive import AdaptiveExperts
from dynamic_dino.moe.layer import MoEFeedForward
from omegaconf import OmegaConf

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(
    str(path.relative_to(CONFIGS))
    for family in ("pretrain", "moe_tuning", "himoe", "dynmoe")
    for path in (CONFIGS / family).rglob("*.py")
)
SIZE = 96


def shrink(model):
    """The recipe's modules, with small towers, few layers and queries, and narrow FFNs."""
    if model.backbone.name.startswith("efficientvit"):
        random = LazyConfig.load(str(CONFIGS / "common/models/edge_random.py")).model
        model.backbone, model.text_encoder = random.backbone, random.text_encoder
        model.backbone.name = "efficientvit_b0.r224_in1k"
        model.text_encoder.config = dict(
            hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
        )
        model.enhancer.in_channels = [32, 64, 128]
        model.enhancer.cross_scale.block.depth = 1
    if model.backbone.name.startswith("resnet"):
        model.backbone.name, model.backbone.weights = "resnet18", None
        model.neck.in_channels = [128, 256, 512]
    model.enhancer.num_layers = 1
    model.decoder.num_layers = 2
    model.query_selection.num_queries = 30
    if "denoising" in model:
        model.denoising.num_queries = 8
    model.canvas = SIZE
    for ffn in (model.decoder.layer.ffn, model.enhancer.layer.image.ffn):
        ffn.hidden = 32
    return model


@functools.cache
def tower(yaml: str):
    return instantiate(OmegaConf.create(yaml))


def build(node):
    towers = {}
    for name in ("backbone", "text_encoder"):
        target = node[name]._target_
        target = target if isinstance(target, str) else f"{target.__module__}.{target.__name__}"
        options = OmegaConf.to_container(node[name])
        towers[name] = copy.deepcopy(tower(OmegaConf.to_yaml({**options, "_target_": target})))
    return instantiate({**node, **towers})


def samples(phrases):
    batch = []
    for height, width in ((SIZE, SIZE), (80, SIZE)):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[5.0, 10, 70, 60], [30, 20, 90, 75]]))
        instances.gt_classes = torch.tensor([1, 0])
        batch.append(
            {
                "image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8),
                "image_size": (height, width),
                "height": height,
                "width": width,
                "prompt": Prompt.parse(phrases),
                "instances": instances,
            }
        )
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_step_and_evaluation(recipe):
    cfg = load_config(CONFIGS / recipe)
    names = cfg.model.text_encoder.get("names")  # of a closed set
    phrases = f"{names[3]}. {names[0]}." if names else "red circle. windmill."
    model, batch = build(shrink(cfg.model)), samples(phrases)
    set_trainable(model, cfg.train.trainable)
    set_train_mode(model)
    optimizer = build_optimizer(cfg.optimizer, model)
    outputs = model(batch)
    losses = {name: value for name, value in outputs.items() if name.startswith("loss")}
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, p in trained.items() if p.grad is None]
    assert not missing, "distributed training waits for every gradient"
    assert all(p.grad.isfinite().all() for p in trained.values())

    layers = [m for m in model.modules() if isinstance(m, MoEFeedForward)]
    routings = outputs.get("routings", [])
    assert [r.num_experts for r in routings] == [layer.router.num_experts for layer in layers]
    assert {loss.name for loss in model.criterion.router_losses} <= losses.keys()
    for layer, routing in zip(layers, routings, strict=True):
        assert layer.router.weight.grad.abs().max() > 0
        taken = bool((routing.expert_ids >= 0).any())  # DynMoE's tokens may take none
        assert bool(layer.experts.w1.grad.abs().max() > 0) == taken
    optimizer.step()
    if cfg.train.adaptive_experts.enabled:
        process = AdaptiveExperts(model)
        process.record(routings)
        process.adapt(optimizer)

    with torch.no_grad():
        results = model.eval()(batch)
    assert len(results) == 2 and all(len(r["instances"]) > 0 for r in results)
    assert len(results[0]["routings"]) == len(layers)
