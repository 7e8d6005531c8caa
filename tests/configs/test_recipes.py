"""Every model of a recipe is built once: its structure, what trains, a training step, and an
evaluation. A recipe's variants differ by what they say."""

import copy
import functools
import inspect
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, Instances
from detectron2.utils.registry import locate
from dynamic_dino.config import (
    NODES,
    ConfigError,
    apply_overrides,
    flat,
    load_config,
    variants,
    variants_table,
)
from dynamic_dino.engine.cli import main as train_net
from dynamic_dino.engine.optim import build_optimizer
from dynamic_dino.engine.trainable import set_train_mode, set_trainable
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.moe.adaptive import AdaptiveExperts
from dynamic_dino.moe.hierarchical import HierarchicalRouter
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.part_router import PartRouter
from dynamic_dino.moe.routers import SoftmaxRouter
from dynamic_dino.moe.top_any import TopAnyRouter
from dynamic_dino.trust import require_known_targets
from omegaconf import DictConfig, ListConfig, OmegaConf

CONFIGS = Path(__file__).parents[2] / "configs"
VARIANTS = variants(CONFIGS)
DOCS = CONFIGS.parent / "projects/DynamicDINO/docs"

DENSE = """
    pretrain/dino_nano_drawn pretrain/dino_r50_coco_12ep pretrain/dino_r50_coco_50ep
    pretrain/gdino15_edge_7ep pretrain/gdino_nano_stamps pretrain/nano_drawn pretrain/nano_glyphs
    pretrain/nano_glyphs_described pretrain/nano_photos pretrain/nano_stamps
    finetune/gdino_base_custom finetune/gdino_nano_custom finetune/gdino_tiny_custom
    finetune/mm_gdino_tiny_custom finetune/nano_custom
    moe_tuning/nano_dense_control_glyphs moe_tuning/nano_dense_control_stamps himoe/edge_dense
""".split()
IN_DECODER = {
    SoftmaxRouter: """
        moe_tuning/dynamic_dino_x16_top2 moe_tuning/dynamic_dino_x4_top2
        moe_tuning/dynamic_dino_x8_top2 moe_tuning/dino_r50_x16 moe_tuning/gdino_base_x16
        moe_tuning/gdino_nano_x4 moe_tuning/gdino_tiny_x16 moe_tuning/mm_gdino_tiny_x16
        moe_tuning/nano_x16_custom moe_tuning/nano_x16_drawn moe_tuning/nano_x16_glyphs
        moe_tuning/nano_x16_photos moe_tuning/nano_x16_stamps demo/nano_x16
    """.split(),
    PartRouter: """
        moe_tuning/nano_x16_parts_glyphs moe_tuning/nano_x16_parts_photos
        moe_tuning/nano_x16_parts_stamps
    """.split(),
    HierarchicalRouter: """
        himoe/dino himoe/dino_12ep himoe/dino_nano_drawn himoe/dino_one_scene_router
        himoe/dino_proposal_statistics himoe/dino_tuning himoe/edge himoe/nano_x16_drawn
        himoe/nano_x16_glyphs himoe/nano_x16_photos himoe/nano_x16_stamps
    """.split(),
    TopAnyRouter: ["dynmoe/edge", "dynmoe/nano_drawn", "dynmoe/nano_glyphs", "dynmoe/nano_stamps"],
}
IN_ENHANCER = {
    HierarchicalRouter: ["himoe/dino_encoder", "himoe/edge_encoder", "himoe/nano_encoder_stamps"]
}
IN_BOTH = {
    SoftmaxRouter: [
        "moe_tuning/ablations/table9_encoder_moe",
        "moe_tuning/nano_encoder_decoder_stamps",
    ],
    HierarchicalRouter: [
        "himoe/dino_encoder_decoder",
        "himoe/edge_encoder_decoder",
        "himoe/nano_encoder_decoder_stamps",
    ],
    TopAnyRouter: ["dynmoe/edge_encoder_decoder"],
}
ROUTERS = {  # recipe -> where its experts are, and what routes to them
    recipe: (places, router)
    for places, recipes_of in (
        (("decoder",), IN_DECODER),
        (("enhancer",), IN_ENHANCER),
        (("enhancer", "decoder"), IN_BOTH),
    )
    for router, recipes in recipes_of.items()
    for recipe in recipes
}
END_TO_END = """
    himoe/dino himoe/dino_12ep himoe/dino_encoder himoe/dino_encoder_decoder
    himoe/dino_one_scene_router himoe/dino_proposal_statistics
""".split()
ROUTER_LOSSES = {
    SoftmaxRouter: ["LoadBalanceLoss"],
    PartRouter: ["LoadBalanceLoss"],
    HierarchicalRouter: ["SquaredBalanceLoss", "DiversityLoss"],
    TopAnyRouter: ["SparseGatingLoss"],
}
RECIPES = [*DENSE, *ROUTERS]
# Of public weights' sizes: built without memory, not trained.
LARGE = [
    "finetune/gdino_base_custom",
    "finetune/gdino_tiny_custom",
    "finetune/mm_gdino_tiny_custom",
    "moe_tuning/gdino_base_x16",
    "moe_tuning/mm_gdino_tiny_x16",
]
ENCODERS = ("backbone", "text_encoder")
SIZE = 96


@functools.cache
def loaded(recipe: str) -> DictConfig:
    return load_config(CONFIGS / f"{recipe}.py")


@functools.cache
def encoder(yaml: str, device: str):
    with torch.device(device):
        return instantiate(OmegaConf.create(yaml))


def build(node, device: str = "cpu"):
    """A model; backbones and text encoders are built once for all that have the same."""
    built = {}
    for name in ENCODERS:
        target = node[name]._target_
        target = target if isinstance(target, str) else f"{target.__module__}.{target.__name__}"
        yaml = OmegaConf.to_yaml({**OmegaConf.to_container(node[name]), "_target_": target})
        built[name] = copy.deepcopy(encoder(yaml, device))
    with torch.device(device):
        return instantiate({**node, **built})


def shrink(model):
    """The recipe's modules, with small encoders, few layers and queries, and narrow FFNs."""
    if model.backbone.name.startswith("efficientvit"):
        edge = LazyConfig.load(str(CONFIGS / "common/models/edge.py")).model
        random = LazyConfig.load(str(CONFIGS / "common/models/edge_random.py")).model
        assert all(model[name] == edge[name] for name in ENCODERS)
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


def test_the_recipes_are_those_listed_here():
    files = {str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.py")}
    others = {file for file in files if file.startswith(("common/", "eval/"))}  # see test_eval.py
    assert files - others - {"variants"} == set(RECIPES) and len(RECIPES) == len(set(RECIPES))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe):
    cfg = copy.deepcopy(loaded(recipe))
    if recipe not in LARGE:
        shrink(cfg.model)
    check_structure(cfg, tried(cfg, "meta" if recipe in LARGE else "cpu"), recipe)


_tried = {}


def tried(cfg, device: str):
    """The model without its memory, after a step and an evaluation. Recipes that differ in their
    data, schedule or rates alone are tried once."""
    parts = {"model": cfg.model, "train": cfg.train.trainable, "change": cfg.train.adaptive_experts}
    key = [*flat(OmegaConf.create({**parts, "to": device}, flags={"allow_objects": True})).items()]
    key += [(k, v) for k, v in flat(cfg.optimizer).items() if not isinstance(v, int | float)]
    if (key := repr(key)) not in _tried:
        model = build(cfg.model, device)
        set_trainable(model, cfg.train.trainable)
        optimizer = build_optimizer(cfg.optimizer, model)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)
        if device != "meta":
            check_step_and_evaluation(cfg, model, optimizer)
        model.zero_grad()
        _tried[key] = model.to("meta")
    return _tried[key]


def targets(cfg) -> set[str]:
    """The import paths of all that it calls."""
    return {value for key, value in flat(cfg).items() if key.endswith("_target_")}


@pytest.mark.parametrize("recipe", RECIPES)
def test_config(recipe):
    """Every key is read: by the engine, by another node, or by what a node calls; and the
    config.yaml of a run is trusted."""
    cfg = loaded(recipe)
    require_known_targets([{"_target_": name} for name in targets(cfg)])
    assert set(cfg) <= {*NODES, "data"}
    for path, node in nodes(cfg):
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
        mapper = cfg.dataloader.train.mapper
        assert mapper.size == cfg.inference.size or (mapper.size is None and mapper.augmentations)
    else:
        assert cfg.model.canvas is None

    schedule = instantiate(cfg.lr_multiplier)
    rates = [schedule(i / 200) for i in range(200)]
    assert all(0 < rate <= 1 for rate in rates) and max(rates) == pytest.approx(1, abs=0.05)
    assert rates[0] < 0.5 and rates[-1] < 0.11


def check_structure(cfg, model, recipe: str) -> None:
    """Experts, router losses and what trains."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    mixtures = {n: m for n, m in model.named_modules() if isinstance(m, MoEFeedForward)}
    losses = [type(loss).__name__ for loss in model.criterion.router_losses]
    if recipe in DENSE:
        assert not mixtures and not losses and not cfg.train.adaptive_experts.enabled
        return
    places, router = ROUTERS[recipe]
    ffns = {
        "decoder": [f"decoder.layers.{i}.ffn" for i in range(len(model.decoder.layers))],
        "enhancer": [f"enhancer.layers.{i}.image.ffn" for i in range(len(model.enhancer.layers))],
    }
    assert set(mixtures) == {name for place in places for name in ffns[place]}
    assert all(type(m.router) is router for m in mixtures.values())
    assert losses == ROUTER_LOSSES[router]
    assert cfg.train.adaptive_experts.enabled == (router is TopAnyRouter)
    for name in mixtures:
        assert {f"{name}.router.weight", f"{name}.experts.w1"} <= trained
    assert bool(cfg.train.init_checkpoint) != (recipe in END_TO_END)
    if recipe in END_TO_END:
        assert "backbone.body.layer4.0.conv1.weight" in trained
    else:
        assert not any(n.startswith(("backbone.", "text_encoder.body.")) for n in trained)
        assert not any(".self_attention." in n or ".norm1." in n for n in trained)


def check_step_and_evaluation(cfg, model, optimizer) -> None:
    names = cfg.model.text_encoder.get("names")  # of a closed set
    batch = samples(f"{names[3]}. {names[0]}." if names else "red circle. windmill.")
    set_train_mode(model)
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


# ---- variants -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name):
    """Its experts can be built, and nothing is changed but the keys that it names."""
    title, overrides = VARIANTS[name]
    recipe = loaded(name.partition(":")[0])
    cfg = apply_overrides(copy.deepcopy(recipe), overrides)
    require_known_targets([{"_target_": name} for name in targets(cfg) - targets(recipe)])
    keys = {override.partition("=")[0] for override in overrides}
    found = set().union(*(differences(recipe[n], cfg[n], n) for n in NODES))
    assert title and found and found <= keys
    assert all(
        OmegaConf.select(cfg, key) == OmegaConf.select(recipe, key) for key in keys - found
    ), "what is no difference repeats the recipe's value"
    with torch.device("meta"):
        for ffn in (cfg.model.decoder.layer.ffn, cfg.model.enhancer.layer.image.ffn):
            instantiate(ffn)


def differences(a, b, prefix: str) -> set[str]:
    """The dotted keys of values that aren't the same."""
    a, b = (
        OmegaConf.to_container(x) if isinstance(x, DictConfig | ListConfig) else x for x in (a, b)
    )
    if isinstance(a, list) and isinstance(b, list) and any(isinstance(x, dict) for x in [*a, *b]):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        keys = a.keys() | b.keys()
        return set().union(*(differences(a.get(k), b.get(k), f"{prefix}.{k}") for k in keys))
    return set() if a == b else {prefix}


def test_a_variant_is_loaded_like_a_recipe():
    cfg = load_config(
        f"{CONFIGS}/himoe/dino.py:x16_top1", ["model.decoder.layer.ffn.router.temperature=2.0"]
    )
    router = cfg.model.decoder.layer.ffn.router
    assert (router.num_experts, router.top_k, router.temperature) == (16, 1, 2.0)
    assert cfg.train.output_dir == "output/himoe/dino_x16_top1"
    on_coco = load_config(CONFIGS / "eval/coco.py", model=f"{CONFIGS}/himoe/edge.py:x4_top2")
    assert on_coco.model.decoder.layer.ffn.router.num_experts == 4
    assert on_coco.train.init_checkpoint == "output/himoe/edge_x4_top2/model_final.pth"
    assert on_coco.train.output_dir == "output/eval/coco"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("himoe/dino.py:x16_top", "dino.py has no variant 'x16_top'; did you mean x16_top[14]?"),
        ("dynmoe/edge.py:zzz", "edge.py has no variant 'zzz'; it has max16, fixed"),
        ("himoe/dino_12ep.py:x16_top1", "no variant 'x16_top1'; it has none"),
        ("himoe/dino_x16_top1.py", "did you mean .*himoe/dino.py:x16_top1?"),
        ("himoe/dyno.py:x16_top1", "dyno.py does not exist"),
    ],
)
def test_wrong_variant(path, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        load_config(CONFIGS / path)


def test_a_variant_needs_a_table(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("model = dict(x=3)\ndataloader = dict(x=3)\n")
    with pytest.raises(ConfigError, match="recipe.py:small: no folder above .* has a variants.py"):
        load_config(f"{recipe}:small")
    table = '{"recipe:small": ("a small one", ["model.x=1"])}'
    (tmp_path / "variants.py").write_text(f"VARIANTS = {table}")
    assert load_config(f"{recipe}:small").model.x == 1


def test_train_net_takes_a_variant(monkeypatch, capsys):
    taken = []
    monkeypatch.setattr(
        "dynamic_dino.engine.cli.launch", lambda run, args: taken.append(args.config_file)
    )
    train_net(["--variant", "dynmoe/nano_stamps:max16"])
    train_net(["--config-file", f"{CONFIGS}/dynmoe/nano_stamps.py", "--variant", "max16"])
    assert [Path(file).resolve() for file in taken] == 2 * [CONFIGS / "dynmoe/nano_stamps.py:max16"]
    train_net(["--variants"])
    assert capsys.readouterr().out == variants_table(CONFIGS)
    for arguments, message in (
        (["--variant", "himoe/dino:x16_tpo1"], "did you mean x16_top1?"),
        (["--variant", "himoe/dino:x16_top1", "--config-file", "a.py"], "leave out --config-file"),
    ):
        with pytest.raises(SystemExit):
            train_net(arguments)
        assert message in capsys.readouterr().err


def test_documented_variants():
    table = variants_table(CONFIGS)
    page = (DOCS / "recipes.md").read_text()
    assert table in page, "docs/recipes.md: put in what train_net.py --variants prints"


@pytest.mark.slow
@pytest.mark.slow
def test_what_trains():
    """The paper's section 3.1, and the ablation of it."""
    kinds = ("fusion", "experts", "router", "class_head", "box_head", "linear1", "linear2")

    def trained_kinds(model, recipe: str) -> set[str]:
        model = copy.deepcopy(model)
        set_trainable(model, load_config(f"{CONFIGS}/{recipe}").train.trainable)
        names = [n.split(".") for n, p in model.named_parameters() if p.requires_grad]
        assert all(set(kinds) & set(name) for name in names)
        return {kind for kind in kinds if any(kind in name for name in names)}

    moe, heads = {"experts", "router"}, {"class_head", "box_head"}
    model = build(shrink(copy.deepcopy(loaded("moe_tuning/nano_x16_drawn")).model))
    assert trained_kinds(model, "moe_tuning/nano_x16_drawn.py") == {"fusion", *moe, *heads}
    main = "moe_tuning/dynamic_dino_x16_top2.py"
    assert trained_kinds(model, main) == {"fusion", *moe, *heads}
    assert trained_kinds(model, f"{main}:trains_experts") == moe
    assert trained_kinds(model, f"{main}:trains_experts_fusion") == {"fusion", *moe}
    assert trained_kinds(model, f"{main}:trains_experts_heads") == moe | heads
    control = "moe_tuning/nano_dense_control_stamps"
    dense = build(shrink(copy.deepcopy(loaded(control)).model))
    assert trained_kinds(dense, f"{control}.py") == {"fusion", "linear1", "linear2", *heads}
