"""A detector on weights packed for oneDNN finds what the plain one finds."""

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from dynamic_dino.config import load_config
from dynamic_dino.modeling.feed_forward import FeedForward
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.modeling.vocabulary import ClassVocabulary
from dynamic_dino.moe.experts import Experts
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.serving import packing
from dynamic_dino.serving.deploy import optimize_for_inference, replace_modules
from dynamic_dino.serving.inference import load_detector
from dynamic_dino.serving.packing import (
    PackedExperts,
    PackedFeedForward,
    PackedLinear,
    packed_modules,
)
from dynamic_dino_kernels.packing import obstacle
from helpers.samples import batch
from torch import nn

pytestmark = pytest.mark.skipif(obstacle() != "", reason=obstacle() or "packs")
CONFIGS = Path(__file__).parents[2] / "configs"


def random_detector(recipe: str) -> nn.Module:
    return instantiate(load_config(CONFIGS / recipe).model).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def drawn() -> nn.Module:
    return random_detector("moe_tuning/nano_x16_drawn.py")


def count(model: nn.Module, *kinds: type) -> int:
    return sum(type(m) in kinds for m in model.modules())


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("model", ["nano-dense", "nano-x16"])
def test_shipped_detectors_find_the_same(model):
    picture = torch.randint(256, (200, 260, 3), dtype=torch.uint8).numpy()
    plain, packed = (load_detector(model, device="cpu", pack=p) for p in ("never", "always"))
    assert count(plain.model, PackedLinear, PackedExperts) == 0
    assert count(packed.model, PackedLinear) > 40 and count(packed.model, Experts, FeedForward) == 0
    assert count(packed.model, PackedExperts) == (3 if model == "nano-x16" else 0)
    mine, want = (d(picture, "dog. cat. red panda.", threshold=0.0) for d in (packed, plain))
    torch.testing.assert_close(mine.scores, want.scores, rtol=1e-4, atol=1e-5)
    assert len(mine) == len(want) > 50


@torch.inference_mode()
def test_every_layer_of_a_random_detector_is_packed_and_none_unpacked(drawn, monkeypatch):
    plain = optimize_for_inference(copy.deepcopy(drawn), pack="never")
    packed = optimize_for_inference(copy.deepcopy(drawn), pack="always")
    samples = batch("red circle. blue square.", "green star.")
    expected = plain(samples)
    monkeypatch.setattr(PackedLinear, "weight", property(lambda self: pytest.fail("unpacked")))
    for mine, want in zip(packed(samples), expected, strict=True):
        mine, want = mine["instances"], want["instances"]
        torch.testing.assert_close(mine.scores, want.scores, rtol=1e-3, atol=1e-4)
    left = [
        name
        for part, child in packed.named_children()
        if part not in packing.PARTS_LEFT
        for name, module in child.named_modules(prefix=part)
        if isinstance(module, nn.Linear)
    ]
    assert left and all(name.rsplit(".")[-1] in packing.FACTORS for name in left)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize(
    "recipe", ["dynmoe/nano_drawn.py", "himoe/nano_x16_drawn.py", "himoe/dino_nano_drawn.py"]
)
def test_other_mixtures(recipe):
    detector = random_detector(recipe)
    served = [optimize_for_inference(copy.deepcopy(detector), pack=p) for p in ("never", "always")]
    assert count(served[1], PackedExperts) == count(detector, Experts) > 0
    samples = batch("red circle. blue square.")
    if isinstance(detector.text_encoder, ClassVocabulary):
        samples[0]["prompt"] = Prompt.from_phrases(detector.text_encoder.names)
    mine, want = (d(samples)[0]["instances"].scores for d in served[::-1])
    torch.testing.assert_close(mine, want, rtol=1e-3, atol=1e-4)


def test_activations_become_part_of_the_layer_before():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            layers = [nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)]
            self.layers = nn.Sequential(*layers, nn.GELU(), nn.Linear(8, 3, bias=False))
            self.ffns = nn.ModuleList(FeedForward(3, 7, act) for act in ("relu", "gelu", "silu"))
            self.ffns.append(FeedForward(3, 7, "tanh"))
            self.ffns.append(self.ffns[0])  # shared
            self.text_encoder = nn.Linear(3, 3)

        def forward(self, x):
            x = self.layers(x)
            for ffn in self.ffns:
                x = ffn(x, norm=nn.LayerNorm(3))[0] + ffn(x)[0]
            return x

    model, x = Model().eval().requires_grad_(False), torch.randn(4, 6, 5)
    expected, replaced = model(x), packed_modules(model, 24, "always")
    replace_modules(model, replaced)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    kinds = [type(layer) for layer in model.layers]
    assert kinds == [*[PackedLinear, nn.Identity] * 2, PackedLinear, nn.GELU, PackedLinear]
    assert [type(ffn) for ffn in model.ffns[:4]] == [*[PackedFeedForward] * 3, FeedForward]
    assert isinstance(model.ffns[3].linear1, PackedLinear) and model.ffns[4] is model.ffns[0]
    assert type(model.text_encoder) is nn.Linear


def test_what_is_measured_to_be_faster_is_packed(drawn, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    gains = {True: 0.9, False: 2.0}
    monkeypatch.setattr(packing, "gain", lambda rows, i, o, act="none": gains[o == 256])
    monkeypatch.setattr(packing, "expert_gain", lambda rows, dim, hidden, act="relu": 1.5)
    served = optimize_for_inference(copy.deepcopy(drawn))
    experts, layers = count(served, PackedExperts), count(served, PackedLinear)
    assert experts == count(drawn, Experts) > 0 and layers > 0
    of_ffns = {
        m for f in served.modules() if isinstance(f, PackedFeedForward) for m in f.children()
    }
    alone = {m for m in served.modules() if isinstance(m, PackedLinear)} - of_ffns
    assert of_ffns and alone and all(layer.out_features != 256 for layer in alone)
    line = caplog.messages[-1]
    assert f"{experts} of {experts} mixtures of experts" in line and "times as fast" in line

    monkeypatch.setattr(packing, "expert_gain", lambda *args: 1.05)  # not told from noise
    monkeypatch.setattr(packing, "gain", lambda *args: 0.5)
    served = optimize_for_inference(copy.deepcopy(drawn))
    assert count(served, PackedExperts, PackedLinear) == 0
    assert caplog.messages[-1].endswith(
        "not packed for oneDNN: at best that is 1.05 times as fast here"
    )


def test_an_explicit_backend_is_kept(drawn):
    detector = copy.deepcopy(drawn)
    for module in detector.modules():
        if isinstance(module, Experts):
            module.backend = "sequential"
    served = optimize_for_inference(detector, pack="always")
    assert count(served, PackedExperts) == 0 and count(served, PackedLinear) > 0


@pytest.mark.slow
def test_other_dtypes_and_ways_are_not_packed(drawn):
    for options in ({"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"mode": "compile"}):
        served = optimize_for_inference(copy.deepcopy(drawn), **options)
        assert count(served, PackedLinear, PackedExperts) == 0
    with pytest.raises(ValueError, match="^pack='always', but the weights are bfloat16"):
        optimize_for_inference(copy.deepcopy(drawn), torch.bfloat16, pack="always")
    with pytest.raises(ValueError, match="^pack='always' doesn't go with accelerate='compile'"):
        optimize_for_inference(copy.deepcopy(drawn), mode="compile", pack="always")
    with pytest.raises(ValueError, match="^pack='yes': choose one of auto, always, never"):
        load_detector(pack="yes")


@torch.inference_mode()
def test_a_packed_detector_saves_its_plain_weights_and_copies_itself(drawn):
    plain = optimize_for_inference(copy.deepcopy(drawn), pack="never")
    served = optimize_for_inference(copy.deepcopy(drawn), pack="always")
    state = served.state_dict()
    assert state.keys() == plain.state_dict().keys()
    for name, weight in plain.state_dict().items():
        assert torch.equal(state[name], weight), name
    again, samples = copy.deepcopy(served), batch("red circle.")
    scores = [d(samples)[0]["instances"].scores for d in (served, again)]
    assert torch.equal(*scores)
    with pytest.raises(RuntimeError, match="weights are packed, so none can be loaded"):
        served.load_state_dict(state)
    assert served.to("cpu") is served
    for cast in (nn.Module.half, nn.Module.double, lambda m: m.to("meta")):
        with pytest.raises(RuntimeError, match="packed for float32 on a CPU and can't be cast"):
            cast(served)


@torch.no_grad()
def test_the_plain_weights_are_freed(drawn):
    detector = copy.deepcopy(drawn)
    experts = next(m for m in detector.modules() if isinstance(m, MoEFeedForward)).experts
    served = optimize_for_inference(detector, pack="always")
    held = {p.data_ptr() for p in served.parameters()} | {b.data_ptr() for b in served.buffers()}
    assert experts.w1.data_ptr() not in held and experts.w2.data_ptr() not in held


@torch.inference_mode()
def test_threads_share_a_packed_detector(drawn):
    served = optimize_for_inference(copy.deepcopy(drawn), pack="always")
    samples = [batch("red circle. blue square.") for _ in range(6)]
    expected = [served(s)[0]["instances"].scores for s in samples]

    def scores(given: list[dict]) -> torch.Tensor:
        with torch.inference_mode():
            return served(given)[0]["instances"].scores

    with ThreadPoolExecutor(3) as pool:
        for mine, want in zip(pool.map(scores, samples), expected, strict=True):
            torch.testing.assert_close(mine, want)
