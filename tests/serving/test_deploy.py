"""A detector made ready to serve gives the results of the trained one."""

import copy
import functools
import re
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from dynamic_dino.config import load_config
from dynamic_dino.modeling.enhancer import ConvNorm, CrossScaleFusion, CSPRepLayer
from dynamic_dino.modeling.postprocess import best_pairs, to_instances
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.modeling.structures import Detections, Predictions, PromptChunk, TextFeatures
from dynamic_dino.moe.routing import Routing
from dynamic_dino.serving.accelerate import CudaGraphs, WithFallback, accelerate
from dynamic_dino.serving.deploy import (
    ConvGELU,
    GELUInPlace,
    fold_batch_norms,
    fuse_gelu,
    gelu_tanh_,
    merge_branches,
    optimize_for_inference,
)
from dynamic_dino.serving.inference import load_detector
from helpers.samples import batch
from timm import create_model
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

RECIPE = Path(__file__).parents[2] / "configs/moe_tuning/nano_x16_drawn.py"


def live(model: nn.Module) -> nn.Module:
    """Statistics and weights as training leaves them, not as they are made."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval().requires_grad_(False)


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", ["efficientvit_b0", "tf_efficientnet_lite0", "resnet18"])
def test_batch_norms_of_any_network_are_folded(name):
    model = live(create_model(name, features_only=True))
    x = torch.randn(2, 3, 64, 64)
    expected, count = model(x), norms(model)
    assert fold_batch_norms(model, lambda: model(x[:1])) == count > 10 and norms(model) == 0
    for y, want in zip(model(x), expected, strict=True):
        torch.testing.assert_close(y, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_the_convolutions_business(approximate, monkeypatch):
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.Identity(), nn.GELU(approximate), nn.Conv2d(8, 8, 1)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.GELU()).eval().requires_grad_(False)
    x = torch.randn(2, 3, 9, 11)
    expected = model(x)
    assert fuse_gelu(model, lambda: model(x)) == 1 and isinstance(model[0], ConvGELU)
    for capability in ("AVX2", "AVX512"):  # both ways, whatever this machine has
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(model(given), expected, rtol=1e-4, atol=1e-5)
    half = model.to(torch.float16)(x.half())  # oneDNN isn't asked
    torch.testing.assert_close(half.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_after_a_linear_layer_works_in_place(approximate):
    layers = [nn.Linear(4, 8), nn.GELU(approximate), nn.Linear(8, 4), nn.ReLU(), nn.GELU()]
    model, x = nn.Sequential(*layers).eval().requires_grad_(False), torch.randn(3, 4)
    expected, given = model(x), x.clone()
    assert fuse_gelu(model, lambda: model(x)) == 1 and isinstance(model[1], GELUInPlace)
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(x, given) and isinstance(model[4], nn.GELU)


@pytest.mark.parametrize("block", [7, 2**18])
def test_gelu_in_place(block):
    x = 8 * torch.randn(2, 3, 5, 4)
    expected = nn.functional.gelu(x.double(), approximate="tanh").float()
    assert gelu_tanh_(x, block) is x
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6)


def test_norms_that_cannot_be_folded_are_left_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.norm1, self.norm2 = nn.Conv2d(3, 3, 1), *map(nn.BatchNorm2d, (3, 3))
            self.after_act = nn.BatchNorm2d(3)

        def forward(self, x):
            x = self.norm2(self.twice(self.norm1(self.twice(x))))
            return self.after_act(x.relu())

    model, x = live(Model()), torch.randn(2, 3, 5, 5)
    expected = model(x)
    assert fold_batch_norms(model, lambda: model(x)) == 0 and norms(model) == 3
    assert torch.equal(model(x), expected)


def test_repvgg_branches_become_one_convolution():
    fusion = CrossScaleFusion(dim=8, block=CSPRepLayer(dim=8, depth=2))
    fusion = live(fusion)
    maps = [torch.randn(1, 8, size, size) for size in (16, 8, 4)]
    expected = fusion(maps)
    fold_batch_norms(fusion, lambda: fusion(maps))
    before = sum(isinstance(m, nn.Conv2d) for m in fusion.modules())
    assert merge_branches(fusion) == 2 * 4
    assert sum(isinstance(m, nn.Conv2d) for m in fusion.modules()) == before - 2 * 4
    for y, want in zip(fusion(maps), expected, strict=True):
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def trained():
    cfg = load_config(RECIPE)
    cfg.model.enhancer.cross_scale = L(CrossScaleFusion)(dim=256, block=L(CSPRepLayer)(dim=256))
    return live(instantiate(cfg.model))


@pytest.fixture
def small():
    """Needs no weights, which a machine with a GPU may lack, and on a pretended GPU little time."""
    model = load_config(RECIPE).model
    model.backbone.weights, model.text_encoder.weights = None, False
    model.query_selection.num_queries, model.decoder.num_layers = 16, 2
    model.decoder.layer.image_attention.update(heads=1, points=1)
    model.decoder.layer.ffn.hidden = 32
    model.decoder.layer.ffn.router.num_experts = 4
    return live(instantiate(model))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_equal_those_of_the_trained_model(trained, dtype):
    """Features, text and selected tokens feed discrete choices: compared is what precedes them.

    As distances relative to the norm. Each of some dozens of operations in a row rounds by half of
    eps at most, independently, so that their errors add up to a few eps.
    """
    samples = batch("red circle. blue square.", "green star.")
    served = optimize_for_inference(copy.deepcopy(trained), dtype)
    assert norms(served) == 0 and norms(trained) > 0
    outputs = []
    for model in (trained, served):
        features, masks = model.image_features(samples)
        memory, text, _ = model.enhancer(
            features, masks, model.text_encoder([s["prompt"] for s in samples])
        )
        tokens = model.query_selection.norm(model.query_selection.proj(memory.tokens))
        outputs.append((memory.tokens.float(), text.tokens.float(), tokens.float()))
        assert memory.tokens.dtype == (torch.float32 if model is trained else dtype)
    for mine, want in zip(*outputs[::-1], strict=True):
        assert (mine - want).norm() <= 20 * torch.finfo(dtype).eps * want.norm()
    result = served(samples)
    assert all(r["instances"].scores.isfinite().all() for r in result)


@torch.no_grad()
def test_detections_equal_those_of_the_trained_model(trained):
    """Rounding may decide which of two tokens is selected on one picture, but not on all five."""
    served = optimize_for_inference(copy.deepcopy(trained))

    def largest_difference() -> float:
        samples = batch("red circle. blue square.", "green star.")
        pairs = zip(served(samples), trained(samples), strict=True)
        return max(
            (mine["instances"].scores - want["instances"].scores).abs().max().item()
            for mine, want in pairs
        )

    assert min(largest_difference() for _ in range(5)) < 1e-4


@pytest.mark.slow
def test_load_detector_takes_precision_and_acceleration():
    picture = torch.randint(256, (64, 80, 3), dtype=torch.uint8).numpy()
    detector = load_detector("nano-x16", device="cpu", dtype="bfloat16", accelerate="graph")
    assert detector.model.decoder.layers[0].ffn.experts.w1.dtype == torch.bfloat16
    assert isinstance(detector.model.detect_chunks, WithFallback) and norms(detector.model) == 0
    assert len(detector(picture, "dog. cat.", threshold=0.0)) > 0
    with pytest.raises(ValueError, match="^dtype 'half': choose one of float32, float16"):
        load_detector(dtype="half")
    with pytest.raises(ValueError, match="^accelerate='fast': choose one of eager, compile"):
        load_detector(accelerate="fast")


@pytest.mark.slow
@torch.no_grad()
def test_prompts_of_many_lengths_share_shapes_where_shapes_are_captured(trained):
    """In float64, so that two products of other lengths agree on what comes first."""
    served = optimize_for_inference(copy.deepcopy(trained), torch.float64, "graph")
    assert optimize_for_inference(copy.deepcopy(trained)).text_encoder.pad_to == 1
    shapes, search = set(), served.detect_chunks.function

    def seen(features, masks, text, *rest):
        shapes.add((text.tokens.shape, text.phrase_map.shape))
        return search(features, masks, text, *rest)

    served.detect_chunks = seen
    for prompt in ("red circle.", "red circle. blue square. green star. a ring."):
        samples = batch(prompt, "dot.")
        served.text_encoder.pad_to = 16
        padded = served(samples)
        served.text_encoder.pad_to = 1
        served.text_encoder.forget()
        for result, expected in zip(padded, served(samples), strict=True):
            result, expected = result["instances"], expected["instances"]
            torch.testing.assert_close(result.scores, expected.scores)
            assert result.phrases == expected.phrases
            torch.testing.assert_close(result.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert len(shapes) == 3 and len({s for s in shapes if s[1][1] == 16}) == 1


# Results


def test_prompts_of_different_lengths_share_a_batch():
    """Padding never shows up, and every image gets what it would get alone."""
    logits, boxes = torch.randn(2, 5, 6), torch.rand(2, 5, 4)
    phrase_map = torch.zeros(2, 3, 6)
    phrase_map[0, 0, 1:3], phrase_map[0, 1, 3], phrase_map[0, 2, 4] = 0.5, 1, 1
    phrase_map[1, 0, 1] = 1
    prompts = [Prompt.parse("one. two. three."), Prompt.parse("one.")]
    samples = batch("zero. one. two. three.", "one.")
    together = best_pairs(Predictions(logits, boxes), phrase_map, most=12)
    found = [[together.of_image(row, PromptChunk(p, 1 - row))] for row, p in enumerate(prompts)]
    results = [r["instances"] for r in to_instances(samples, found, 12)]
    assert [len(r) for r in results] == [12, 5]
    assert set(results[0].phrases) <= {"one", "two", "three"} and set(results[1].phrases) == {"one"}
    for row, result in enumerate(results):
        scores = logits[row].sigmoid() @ phrase_map[row].T
        for score, label, box in zip(
            result.scores, result.pred_classes, result.pred_boxes.tensor, strict=True
        ):
            query = (scores[:, label - (1 - row)] - score).abs().argmin()
            torch.testing.assert_close(scores[query, label - (1 - row)], score)
            cx, cy, w, h = boxes[row, query]
            corners = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]).clamp(0, 1)
            torch.testing.assert_close(box, corners * torch.tensor([300, 200, 300, 200]))
        assert (result.scores.diff() <= 0).all()


# Ways to run


def test_structures_are_seen_through():
    text = TextFeatures(*(torch.randn(2) for _ in range(4)))
    routing = Routing(torch.ones(2, 1), torch.ones(2, 1), torch.ones(2, 3))
    detections = Detections(torch.ones(2), torch.ones(2), torch.ones(2, 4), torch.ones(2), 5)
    flat, spec = tree_flatten(({"p3": torch.ones(1)}, text, [routing], detections))
    assert sum(isinstance(leaf, torch.Tensor) for leaf in flat) == 1 + 4 + 3 + 4
    again = tree_unflatten(flat, spec)
    assert again[1].tokens is text.tokens and again[3].queries == 5


def test_what_fails_is_logged_once_and_the_function_goes_on(caplog):
    calls = []

    def broken(x):
        calls.append("fast")
        raise RuntimeError("out of luck\nat length")

    def successor(x):
        return x + 1

    run = WithFallback(successor, broken, "graph")
    assert [run(1), run(2)] == [2, 3] and calls == ["fast"]
    (record,) = caplog.records
    assert re.match(
        r"accelerate='graph' failed, so \S+successor runs without .*: out of luck \(a CUDA graph",
        record.getMessage(),
    )


@torch.no_grad()
def test_routings_leave_the_search_only_if_they_are_wanted(trained):
    """Each of their tensors would be a copy out of a CUDA graph."""
    samples = batch("red circle.")
    features, masks = trained.image_features(samples)
    text = trained.text_encoder([s["prompt"] for s in samples])
    assert trained.detect_chunks(features, masks, text)[1] == []
    assert len(trained.detect_chunks(features, masks, text, True)[1]) == len(trained.decoder.layers)
    assert not load_detector("nano-x16", device="cpu").model.return_routings


def test_other_devices_are_not_captured():
    graphs = CudaGraphs(lambda x: x * 2)
    assert torch.equal(graphs(torch.ones(3)), torch.full((3,), 2.0)) and not graphs._graphs
    assert accelerate(abs, "eager") is abs


def test_compiled(monkeypatch):
    traced = functools.partial(torch.compile, backend="aot_eager")  # a C++ compiler takes minutes
    monkeypatch.setattr(torch, "compile", traced)
    double = accelerate(lambda maps: {"y": maps["x"] * 2}, "compile")
    x = torch.randn(3)
    torch.testing.assert_close(double({"x": x})["y"], x * 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@torch.inference_mode()
def test_cuda_graphs_follow_new_inputs_and_shapes(small):
    eager = optimize_for_inference(copy.deepcopy(small).cuda())
    graphed = optimize_for_inference(copy.deepcopy(small).cuda(), mode="graph")
    for prompt in ("red circle.", "blue square. green star.", "red circle."):
        samples = batch(prompt)
        mine, want = (m(samples)[0]["instances"] for m in (graphed, eager))
        assert graphed.detect_chunks.fast is not None and graphed.backbone.forward.fast is not None
        torch.testing.assert_close(mine.scores, want.scores, rtol=1e-4, atol=1e-5)


def test_conv_norm_keeps_its_interface():
    layer = live(ConvNorm(3, 4, 3))
    x = torch.randn(1, 3, 8, 8)
    expected = layer(x)
    fold_batch_norms(layer, lambda: layer(x))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
