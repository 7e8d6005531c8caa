"""Between features and results nothing is copied from or to the host, and no shape depends on data.

A CUDA graph can't record that, and without a graph it makes the host wait in every layer.
"""

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from dynamic_dino.config import apply_overrides, load_config, variants
from dynamic_dino.modeling.deformable_enhancer import DeformableEnhancer
from dynamic_dino.modeling.heads import LinearHead
from dynamic_dino.modeling.structures import Target, TextFeatures
from dynamic_dino.moe.experts import Experts
from dynamic_dino.moe.hierarchical import HierarchicalRouter
from dynamic_dino.moe.part_router import PartRouter
from dynamic_dino.moe.routers import SoftmaxRouter
from dynamic_dino.moe.statistics import training_metrics
from dynamic_dino.moe.top_any import TopAnyRouter
from dynamic_dino.serving.deploy import optimize_for_inference
from helpers.capture_scan import CUDA, fake_gpu, faked, patched, scan
from omegaconf import OmegaConf
from torch import nn

CONFIGS = Path(__file__).parents[2] / "configs"
TOWERS = {"backbone", "neck"}
MIXTURES = (".decoder.layer.ffn", ".enhancer.layer.image.ffn", ".criterion.router_losses")
BATCH, TOKENS, OBJECTS = 2, 12, (3, 2)  # images, tokens of their prompts, objects in them

# What the losses can't do without, once in a step.
ALLOWED_IN_TRAINING = {
    "matcher.py:forward: aten::_to_copy copies to the host": "scipy assigns queries to objects on "
    "the host: the costs of all layers and images travel there together",
    "matcher.py:forward: aten::_to_copy copies from the host": "and the pairs it found come back",
}


# ---- the scan -----------------------------------------------------------------------------------


def by_list(x):
    return x[..., [1, 0, 2]]


def from_host(x):
    return x + x.new_tensor([1.0, 2.0, 3.0])


def assigned(x):
    x[[0, 1]] = 0.0


def read(x):
    return x * x.sum().item()


def decided(x):
    return x if x.sum() > 0 else -x


def counted(x):
    return torch.bincount(x.flatten().long())


def found(x):
    return x.nonzero()


def masked(x):
    return x[x > 0]


def to_host(x):
    return x.cpu()


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (by_list, "aten::_to_copy copies from the host"),
        (from_host, "aten::_to_copy copies from the host"),
        (assigned, "aten::_to_copy copies from the host"),
        (read, "aten::_local_scalar_dense is read by the host"),
        (decided, "aten::_local_scalar_dense is read by the host"),
        (counted, "aten::bincount is read by the host"),
        (found, "aten::nonzero has a shape that depends on data"),
        (masked, "aten::index.Tensor has a shape that depends on data"),
        (to_host, "aten::_to_copy copies to the host"),
    ],
)
def test_scan_sees(function, why):
    with fake_gpu():
        faults = scan(function, torch.ones(4, 3, device=CUDA))
    assert set(faults) == {f"test_capture.py:{function.__name__}: {why}"}


def harmless(x):
    index = torch.arange(2, device=x.device)
    x[1] = 2.0
    y = x[index].topk(2).values + torch.tensor([1.0, 2.0]).sum().item()  # on the host alone
    return torch.where(y > 0, y, 0.0).to(torch.float16)


def test_scan_lets_pass():
    with fake_gpu():
        assert scan(harmless, torch.ones(4, 3, device=CUDA)) == []


# ---- the recipes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipes():
    """{name: config} of all that describe a model, and of their variants, of these the model."""
    found = {
        str(path.relative_to(CONFIGS).with_suffix("")): load_config(path)
        for path in sorted(CONFIGS.rglob("*.py"))
        if path.relative_to(CONFIGS).parts[0] not in ("common", "eval", "variants.py")
    }
    for name, (_, overrides) in variants(CONFIGS).items():
        of_model = [override for override in overrides if override.startswith("model.")]
        found[name] = apply_overrides(model_of(found[name.partition(":")[0]]), of_model)
    return found


def model_of(cfg):
    return OmegaConf.create({"model": cfg.model.copy()}, flags={"allow_objects": True})


def is_searched(key):
    return key not in (*TOWERS, "text_encoder")


def parts_of(cfg, wanted):
    model = OmegaConf.to_container(cfg.model)
    return set(modules({key: model[key] for key in model if wanted(key)}))


def covering(parts):
    """A few names, whose sets have between them what all have."""
    left, chosen = set().union(*parts.values()), []
    while left:
        chosen.append(max(parts, key=lambda name: len(parts[name] & left)))
        left -= parts[chosen[-1]]
    return chosen


def covering_detectors(recipes):
    """A few recipes that have, between them, every module of all recipes with all its options but
    numbers, which change no operator; and of the mixtures that differ from theirs, and of their
    losses, another few."""
    parts = {name: parts_of(cfg, is_searched) for name, cfg in recipes.items()}
    mixtures = {n: {p for p in found if p[0].startswith(MIXTURES)} for n, found in parts.items()}
    detectors = covering({name: parts[name] - mixtures[name] for name in parts})
    seen = set().union(*(parts[name] for name in detectors))
    return detectors, covering({name: found - seen for name, found in mixtures.items()})


def modules(node, path=""):
    """What stands at each place of a config: its options, and which modules it is made of."""
    if isinstance(node, list):
        for child in node:
            yield from modules(child, path)
    elif isinstance(node, dict):
        yield path, tuple(sorted((name, option(child)) for name, child in node.items()))
        for name, child in node.items():
            yield from modules(child, f"{path}.{name}")


def option(value):
    if isinstance(value, dict):
        return str(value.get("_target_"))
    if isinstance(value, list):
        return str({option(child) for child in value})
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value != 0)
    return str(value)


def build(cfg, towers=False):
    """The model of a recipe on the meta device, with Triton for a back-end, without a text encoder,
    and with as few layers as have all operators."""
    cfg = model_of(cfg)
    cfg.model.text_encoder._target_ = "torch.nn.Identity"
    if towers:
        cfg.model.backbone.weights = None
    else:
        cfg.model.backbone = cfg.model.neck = None
    cfg.model.enhancer.num_layers, cfg.model.decoder.num_layers = 1, 2
    with torch.device("meta"):
        return on_triton(instantiate(cfg.model))


def on_triton(model):
    for module in model.modules():
        if isinstance(module, Experts):
            module.backend = "triton"
    return model


def features_of(model, dtype):
    """Maps, masks and text as the towers would give them."""
    if isinstance(model.enhancer, DeformableEnhancer):
        levels, dim = model.enhancer.level_embed.shape
        channels = [dim] * levels
    else:
        channels = [projection[0].in_channels for projection in model.enhancer.input_proj]
    maps = {
        f"p{3 + i}": torch.empty(BATCH, c, 16 >> i, 12 >> i, dtype=dtype, device=CUDA)
        for i, c in enumerate(channels)
    }
    masks = {
        name: torch.ones(BATCH, *x.shape[-2:], dtype=torch.bool, device=CUDA)
        for name, x in maps.items()
    }
    head, dim = model.query_selection.class_head, model.query_selection.proj.in_features
    tokens = head.linear.out_features if isinstance(head, LinearHead) else TOKENS
    text = TextFeatures(
        torch.empty(BATCH, tokens, dim, dtype=dtype, device=CUDA),
        torch.ones(BATCH, tokens, dtype=torch.bool, device=CUDA),
        torch.zeros(BATCH, tokens, dtype=torch.int64, device=CUDA),
        torch.empty(BATCH, 5, tokens, dtype=dtype, device=CUDA),
    )
    return maps, masks, text


def losses(model, maps, masks, text):
    """A training step's forward pass, from features on."""
    targets = [
        Target(torch.empty(n, 4, device=CUDA), torch.zeros(n, dtype=torch.int64, device=CUDA))
        for n in OBJECTS
    ]
    output = model.decode(maps, masks, text, targets)
    return {**model.criterion(output, targets), **training_metrics(output.routings)}


@pytest.mark.slow
def test_no_recipe_stops_the_host(recipes):
    """In inference, and in training but for `ALLOWED_IN_TRAINING`."""
    expected = {"inference": Counter(), "training": Counter(ALLOWED_IN_TRAINING.keys())}
    chosen, _ = covering_detectors(recipes)
    assert len(chosen) > 7
    wrong = {}
    for name in chosen:
        model = build(recipes[name])
        served = copy.deepcopy(model).eval().half()
        with fake_gpu(), patched(torch.Tensor, "numpy", lambda t: np.zeros(t.shape)):
            faults = {}
            with torch.no_grad():
                faults["inference"] = scan(
                    faked(served).detect_chunks, *features_of(served, torch.float16)
                )
            faults["training"] = scan(losses, faked(model), *features_of(model, torch.float32))
        for way, found in faults.items():
            if Counter(found) != expected[way]:
                wrong[name, way] = found
    assert not wrong


@pytest.mark.slow
def test_no_mixture_stops_the_host(recipes):
    """Where it differs from those of the detectors above: in the place of an FFN, and its losses
    of two layers."""
    _, chosen = covering_detectors(recipes)
    scanned, wrong = 0, {}
    for name in chosen:
        model = recipes[name].model
        for node in (model.decoder.layer.ffn, model.enhancer.layer.image.ffn):
            if "router" not in node:
                continue
            with torch.device("meta"):
                ffn, norm = on_triton(instantiate(node)), nn.LayerNorm(node.dim)
                router_losses = instantiate(model.criterion.router_losses)
            for training in (False, True):
                layer = copy.deepcopy(nn.ModuleList((ffn, norm)).train(training))
                with fake_gpu(), torch.set_grad_enabled(training):
                    layer = faked(layer if training else layer.half())
                    x, scene = (
                        torch.empty(*shape, dtype=layer[1].weight.dtype, device=CUDA)
                        for shape in ((BATCH, TOKENS, node.dim), (BATCH, node.dim))
                    )

                    def step():
                        routings = 2 * [layer[0](x, scene, layer[1])[1]]  # noqa: B023
                        if training:  # noqa: B023
                            [loss(routings) for loss in router_losses]  # noqa: B023
                            training_metrics(routings)

                    scanned += 1
                    if found := scan(step):
                        wrong[name, training] = found
    assert scanned > 10 and not wrong


@pytest.mark.slow
def test_no_tower_stops_the_host(recipes):
    """Backbone and neck as `load_detector` serves them, in half precision."""
    wrong = {}
    parts = {name: parts_of(cfg, lambda key: key in TOWERS) for name, cfg in recipes.items()}
    for name in covering(parts):
        model = optimize_for_inference(build(recipes[name], towers=True), torch.float16)
        with fake_gpu(), torch.no_grad():
            backbone, neck = (faked(m or nn.Identity()) for m in (model.backbone, model.neck))
            image = torch.empty(BATCH, 3, 96, 64, dtype=torch.float16, device=CUDA)
            if found := scan(lambda: neck(backbone(image))):  # noqa: B023
                wrong[name] = found
    assert not wrong


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: SoftmaxRouter(8, 6, 2, tied=False),
        lambda: SoftmaxRouter(8, 6, 2, gate="renormalized", tied=False),
        lambda: SoftmaxRouter(8, 6, 2, gate="straight_through", tied=False),
        lambda: PartRouter(8, 6, 2),
        lambda: HierarchicalRouter(8, 6, 2, num_routes=3, active_routes=2),
        lambda: HierarchicalRouter(8, 6, 2, variant="instance"),
        lambda: HierarchicalRouter(8, 6, 1, num_routes=3, active_routes=1, variant="scene"),
        lambda: TopAnyRouter(8, 6),
        lambda: TopAnyRouter(8, 6, initial_experts=4, forced_k=2),
    ],
)
def test_no_router_stops_the_host_even_without_some_experts(make, training):
    with torch.device("meta"):
        router: nn.Module = make().train(training)
    router.drop(1, 4)
    with fake_gpu():
        tokens, scene = torch.empty(2, 7, 8, device=CUDA), torch.empty(2, 8, device=CUDA)
        assert scan(faked(router), tokens, scene) == []
