"""Every recipe loads, and its model, its trained parts, its optimizer and its schedule build."""

import copy
import functools
import inspect
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.registry import locate
from dynamic_dino.config import load_config
from dynamic_dino.engine.optim import build_optimizer
from dynamic_dino.engine.trainable import set_trainable
from dynamic_dino.moe.layer import MoEFeedForward
from omegaconf import DictConfig, ListConfig, OmegaConf

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob("*.py")
    if path.relative_to(CONFIGS).parts[0] not in ("common", "eval")  # see test_eval.py
)
TOWERS = ("backbone", "text_encoder")
ROUTER_LOSSES = {
    "himoe": ["SquaredBalanceLoss", "DiversityLoss"],
    "dynmoe": ["SparseGatingLoss"],
}
NODES = ("model", "optimizer", "lr_multiplier", "dataloader", "train", "inference")


def device(cfg) -> str:
    """Large models are only counted; nano has its real towers."""
    return "cpu" if cfg.model.query_selection.num_queries <= 100 else "meta"


@functools.cache
def tower(yaml: str, device: str):
    with torch.device(device):
        return instantiate(OmegaConf.create(yaml))


def build(cfg):
    """The recipe's model; without a download, and with towers that are built only once."""
    node = cfg.model
    if cfg.model.backbone.name.startswith("resnet50"):
        node.backbone.weights = None
    if cfg.model.backbone.name.startswith("efficientvit"):
        edge = LazyConfig.load(str(CONFIGS / "common/models/edge.py")).model
        random = LazyConfig.load(str(CONFIGS / "common/models/edge_random.py")).model
        for name in TOWERS:
            assert node[name] == edge[name]
            node[name] = random[name]
    towers = {}
    for name in TOWERS:
        target = node[name]._target_
        target = target if isinstance(target, str) else f"{target.__module__}.{target.__name__}"
        yaml = OmegaConf.to_yaml({**OmegaConf.to_container(node[name]), "_target_": target})
        towers[name] = copy.deepcopy(tower(yaml, device(cfg)))
    with torch.device(device(cfg)):
        return instantiate({**node, **towers})


def nodes(cfg, path: str = ""):
    """All lazy calls in a config, with their dotted names."""
    if isinstance(cfg, DictConfig):
        if "_target_" in cfg:
            yield path, cfg
        for key in cfg:
            yield from nodes(cfg._get_node(key), f"{path}.{key}".lstrip("."))
    elif isinstance(cfg, ListConfig):
        for i in range(len(cfg)):
            yield from nodes(cfg._get_node(i), f"{path}[{i}]")


def test_there_are_recipes():
    families = {Path(recipe).parts[0] for recipe in RECIPES}
    assert {"pretrain", "moe_tuning", "himoe", "dynmoe"} <= families and len(RECIPES) > 40


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe):
    cfg = load_config(CONFIGS / recipe)

    calls = dict(nodes(cfg))
    assert {"model", "optimizer", "lr_multiplier"} <= set(calls)
    for path, node in calls.items():
        target = locate(node._target_) if isinstance(node._target_, str) else node._target_
        arguments = {key: None for key in node if key != "_target_"}
        try:
            inspect.signature(target).bind_partial(**arguments)
        except TypeError as error:
            pytest.fail(f"{recipe}: {path}: {error}")

    assert cfg.dataloader.test.keys() == cfg.dataloader.evaluator.keys()
    assert cfg.dataloader.train.total_batch_size > 0
    if best := cfg.train.best_metric:
        assert best.split("/")[0] in cfg.dataloader.test
    if isinstance(cfg.inference.size, int):
        assert cfg.model.canvas == cfg.inference.size, "image and canvas are of one size"
        assert cfg.dataloader.train.mapper.size == cfg.inference.size
    else:
        assert cfg.model.canvas is None

    model = build(cfg)
    set_trainable(model, cfg.train.trainable)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(cfg.optimizer, model)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(trained)

    schedule = instantiate(cfg.lr_multiplier)
    rates = [schedule(i / 200) for i in range(200)]
    assert all(0 < rate <= 1 for rate in rates) and max(rates) == pytest.approx(1, abs=0.05)
    assert rates[0] < 0.5 and rates[-1] < 0.11

    mixtures = {n: m for n, m in model.named_modules() if isinstance(m, MoEFeedForward)}
    dense = recipe.startswith(("pretrain", "finetune"))
    end_to_end = recipe.startswith("himoe/dino") and "tuning" not in recipe and "nano" not in recipe
    if not dense and not recipe.endswith(("control_stamps.py", "control_glyphs.py", "dense.py")):
        places = {
            f"decoder.layers.{i}.ffn": "decoder" for i in range(cfg.model.decoder.num_layers)
        } | {
            f"enhancer.layers.{i}.image.ffn": "enhancer"
            for i in range(cfg.model.enhancer.num_layers)
        }
        placed = {places[name] for name in mixtures}
        assert set(mixtures) == {name for name, place in places.items() if place in placed}
        both, enhancer = "encoder_decoder" in recipe or "table9" in recipe, "enhancer"
        alone = recipe.endswith(("_encoder.py", "nano_encoder_stamps.py")) or "token_moe" in recipe
        assert placed == ({enhancer} if alone else {"decoder", enhancer} if both else {"decoder"})
        family = recipe.split("/")[0]
        losses = [type(loss).__name__ for loss in model.criterion.router_losses]
        assert losses == ROUTER_LOSSES.get(family, ["LoadBalanceLoss"])
        adaptive = family == "dynmoe" and "fixed" not in recipe
        assert cfg.train.adaptive_experts.enabled == adaptive
        for name in mixtures:
            assert {f"{name}.router.weight", f"{name}.experts.w1"} <= trained
        assert bool(cfg.train.init_checkpoint) != end_to_end
        if end_to_end:
            assert "backbone.body.layer4.0.conv1.weight" in trained
            return
        assert not any(n.startswith(("backbone.", "text_encoder.body.")) for n in trained)
        assert not any(".self_attention." in n or ".norm1." in n for n in trained)
    else:
        assert not mixtures and not model.criterion.router_losses


@pytest.mark.slow
def test_what_trains():
    """The paper's section 3.1, and the ablation of it, part by part."""
    kinds = ("fusion", "experts", "router", "class_head", "box_head", "linear1", "linear2")

    def trained_parts(model, recipe: str) -> set[str]:
        model = copy.deepcopy(model)
        set_trainable(model, load_config(CONFIGS / recipe).train.trainable)
        names = [n.split(".") for n, p in model.named_parameters() if p.requires_grad]
        assert all(set(kinds) & set(name) for name in names)
        return {kind for kind in kinds if any(kind in name for name in names)}

    moe, heads = {"experts", "router"}, {"class_head", "box_head"}
    model = build(load_config(CONFIGS / "moe_tuning/nano_x16_drawn.py"))
    assert trained_parts(model, "moe_tuning/nano_x16_drawn.py") == {"fusion", *moe, *heads}
    assert trained_parts(model, "moe_tuning/dynamic_dino_x16_top2.py") == {"fusion", *moe, *heads}
    assert trained_parts(model, "moe_tuning/ablations/parts_experts.py") == moe
    assert trained_parts(model, "moe_tuning/ablations/parts_experts_fusion.py") == {"fusion", *moe}
    assert trained_parts(model, "moe_tuning/ablations/parts_experts_heads.py") == moe | heads
    control = "moe_tuning/nano_dense_control_stamps.py"
    dense = trained_parts(build(load_config(CONFIGS / control)), control)
    assert dense == {"fusion", "linear1", "linear2", *heads}


def test_ablations_change_one_thing():
    """Everything else is the main recipe's."""
    main = load_config(CONFIGS / "moe_tuning/dynamic_dino_x16_top2.py")
    ffn = "model.decoder.layer.ffn"
    expected = {
        "gate_straight_through": {f"{ffn}.gate"},
        "gate_renormalized": {f"{ffn}.gate"},
        "parts_experts": {"train.trainable"},
        "parts_experts_fusion": {"train.trainable"},
        "parts_experts_heads": {"train.trainable"},
        "table10_without_init": {
            f"model.decoder.layer.ffn.init_{x}" for x in ("experts", "router")
        },
        "top1_x8": {f"{ffn}.{x}" for x in ("num_experts", "top_k")},
        "top4_x32": {f"{ffn}.{x}" for x in ("num_experts", "top_k")},
    }
    for name, keys in expected.items():
        cfg = load_config(CONFIGS / f"moe_tuning/ablations/{name}.py")
        found = set().union(*(differences(main[n], cfg[n], n) for n in NODES))
        assert found == {*keys, "train.output_dir"}


def differences(a, b, prefix: str) -> set[str]:
    a, b = (
        OmegaConf.to_container(x) if isinstance(x, DictConfig | ListConfig) else x for x in (a, b)
    )
    if isinstance(a, dict) and isinstance(b, dict):
        keys = a.keys() | b.keys()
        return set().union(*(differences(a.get(k), b.get(k), f"{prefix}.{k}") for k in keys))
    return set() if a == b else {prefix}
