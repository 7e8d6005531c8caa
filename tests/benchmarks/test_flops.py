"""What flops.py counts, against closed forms worked out by hand, and as a user starts it."""

import json

import flops
import pytest
import torch
import torch.nn.functional as F
from dynamic_dino.modeling.attention import DeformableAttention, MultiHeadAttention
from dynamic_dino.modeling.feed_forward import FeedForward
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.part_router import PartRouter
from dynamic_dino.moe.routers import SoftmaxRouter
from dynamic_dino.moe.top_any import TopAnyRouter
from dynamic_dino_kernels.moe import route_any
from helpers.scripts import run_script
from lib import flop_count, tables
from torch import nn

no_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for CUDA")
both_backends = pytest.mark.parametrize(
    "backend", ["grouped", pytest.param("triton", marks=no_interpreter)]
)


class Call(nn.Module):
    """A module as a function of tensors alone, which is what can be traced."""

    def __init__(self, module, function):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *tensors):
        return self.function(self.module, *tensors)


def total(module, *inputs):
    return flop_count.count(module, *inputs).total()


def test_convolution():
    conv = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
    assert total(conv, torch.rand(1, 6, 10, 14)) == 8 * 5 * 7 * (6 // 2) * 3 * 3


def test_product_of_a_broadcast_factor():
    product = Call(nn.Identity(), lambda _, a, b: a @ b)
    assert total(product, torch.rand(3, 4), torch.rand(2, 4, 5)) == 2 * 3 * 4 * 5


def test_dense_ffn_and_its_norm():
    layer = nn.ModuleDict({"ffn": FeedForward(16, 32), "norm": nn.LayerNorm(16)})
    call = Call(layer, lambda m, x: m["ffn"](x, None, m["norm"])[0])
    assert total(call, torch.rand(2, 7, 16)) == 14 * (2 * 16 * 32 + 5 * 16)


@both_backends
def test_experts_cost_a_dense_ffn_the_router_and_the_gated_sum(monkeypatch, backend):
    monkeypatch.setenv("DYNAMIC_DINO_KERNELS", backend)
    ffn = MoEFeedForward(16, 32, SoftmaxRouter(16, 8, 2))
    layer = nn.ModuleDict({"ffn": ffn, "norm": nn.LayerNorm(16)})
    call = Call(layer, lambda m, x: m["ffn"](x, None, m["norm"])[0])
    counted = flop_count.count(call, torch.rand(2, 7, 16))
    assert counted.total("module.ffn.router") == 14 * 8 * 16
    experts = counted.by_operator("module.ffn.experts")
    assert experts["gated_sum"] == 14 * 2 * 16
    assert experts["expert_ffn"] == 14 * 2 * 16 * 32  # k experts of hidden / k
    assert counted.total() == 14 * (2 * 16 * 32 + 5 * 16 + 8 * 16 + 2 * 16)


class TopAny(nn.Module):
    """Answers as a detector does: each batch's routings with its first result."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = MoEFeedForward(16, 32, router=TopAnyRouter(16, 6))

    def forward(self, batch: list[dict]) -> list[dict]:
        y, routing = self.ffn(batch[0]["image"])
        return [{"routings": [routing], "y": y}]


class OfImage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.detector = TopAny()

    def forward(self, image):
        return self.detector([{"image": image}])[0]["y"]


def test_empty_slots_cost_nothing():
    model, x = OfImage().eval(), torch.randn(2, 30, 16)
    [routing] = model.detector([{"image": x}])[0]["routings"]
    filled = int((routing.expert_ids >= 0).sum())
    assert 60 <= filled < 6 * 60
    analysis = flop_count.count(model, x)
    own = flop_count.own_counts(analysis, flop_count.empty_slots(model.detector, {"image": x}))
    experts = own["detector.ffn.experts"]
    assert experts["expert_ffn"] == filled * 2 * 16 * 32 and experts["gated_sum"] == filled * 16
    assert sum(c.total() for c in own.values()) == analysis.total() - (360 - filled) * (1024 + 16)


@both_backends
def test_cosine_router(monkeypatch, backend):
    monkeypatch.setenv("DYNAMIC_DINO_KERNELS", backend)
    tensors = torch.rand(14, 16), torch.rand(8, 16), torch.rand(8)
    call = Call(nn.Identity(), lambda _, *t: route_any(*t).gates)
    assert total(call, *tensors) == 14 * 8 * 16 + 14 * 16 + 8 * 16


def test_part_router():
    call = Call(PartRouter(16, num_experts=8, parts=2), lambda router, x: router(x).gates)
    assert total(call, torch.rand(2, 7, 16)) == 14 * 8 * 16


@pytest.mark.parametrize("masked", [False, True])
def test_attention(masked):
    q, k = torch.rand(2, 5, 16), torch.rand(2, 9, 16)
    mask = [torch.ones(2, 1, 9, dtype=torch.bool)] if masked else []
    expected = 2 * (2 * 5 * 16 * 16 + 2 * 9 * 16 * 16 + 2 * 5 * 9 * 16)
    assert total(MultiHeadAttention(16, heads=4), q, k, k, *mask) == expected


@both_backends
def test_deformable_attention(monkeypatch, backend):
    monkeypatch.setenv("DYNAMIC_DINO_KERNELS", backend)
    shapes, cells, samples = [(4, 6), (2, 3)], 30, 4 * 2 * 3  # heads, levels, points
    attention = DeformableAttention(16, heads=4, levels=2, points=3, value_dim=8)
    call = Call(attention, lambda m, *t: m(*t[:4], shapes, t[4]))
    memory, mask = torch.rand(1, cells, 16), torch.ones(1, cells, dtype=torch.bool)
    tensors = torch.rand(1, 5, 16), torch.rand(1, 5, 4), memory, mask, torch.ones(1, 2, 2)
    projections = cells * 16 * 8 + 5 * 16 * 3 * samples + 5 * 8 * 16
    bilinear_and_weighted = 5 * samples * (8 // 4) * (4 + 1)
    assert total(call, *tensors) == projections + bilinear_and_weighted


def test_what_no_output_needs_counts_as_well():
    unused = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6))
    call = Call(nn.ModuleList([unused, nn.Linear(4, 3)]), lambda m, x: (m[0](x), m[1](x))[1])
    assert total(call, torch.rand(7, 4)) == 7 * (4 * 5 + 5 * 6 + 4 * 3)


def test_an_unknown_operator_is_named():
    call = Call(nn.Identity(), lambda _, x: torch.cdist(x, x))
    with pytest.raises(RuntimeError, match="aten::cdist"):
        flop_count.count(call, torch.rand(3, 4))


def test_a_module_that_was_passed_by_is_named():
    call = Call(nn.Linear(4, 4), lambda m, x: F.linear(x, m.weight))
    with pytest.raises(RuntimeError, match="never called: module"):
        flop_count.count(call, torch.rand(3, 4))


# ---- the script, on nano ------------------------------------------------------------------------

D, HIDDEN, EXPERTS, QUERIES, NAMES, LAYERS = 256, 512, 16, 100, 3, 2
CELLS = 40 * 40 + 20 * 20 + 10 * 10


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("flops") / "new" / "flops.json"
    arguments = "--config-file configs/moe_tuning/nano_x16_stamps.py --size 320 320 --experts 16"
    more = ["--names", "dog. cat. cup.", "--json", path, f"model.decoder.num_layers={LAYERS}"]
    text = run_script(flops.main, *arguments.split(), "--depth", "1", *more)
    return text, json.loads(path.read_text())


@pytest.mark.slow
def test_parts_add_up_to_the_total(script):
    for model in script[1]["models"].values():
        counted = model["flops"]
        assert sum(counted["stages"].values()) == counted["total"] > 1e9
        assert sum(counted["decoder"].values()) == counted["stages"]["decoder"]
        of_all = counted["decoder"]["heads"] + counted["decoder"]["other"]
        assert LAYERS * counted["decoder_layer"] + of_all == counted["stages"]["decoder"]
        assert (
            sum(model["modules"].values()) + counted["stages"]["post-processing"]
            == (counted["total"])
        )


@pytest.mark.slow
def test_the_decoder_part_by_part(script):
    n = QUERIES * LAYERS
    projections = n * D * D
    samples = 8 * 3 * 4  # heads, levels, points
    assert script[1]["models"]["x16"]["flops"]["decoder"] == {
        "self-attention": 4 * projections + 2 * n * QUERIES * D,
        "text attention": 2 * projections + 2 * NAMES * LAYERS * D * D + 2 * n * NAMES * D,
        "image attention": CELLS * LAYERS * D * 128  # values are 128 wide
        + n * (D * 3 * samples + 128 * D + 5 * samples * 128 // 8),
        "router": n * EXPERTS * D,
        "gated sum": n * 2 * D,
        "layer norms": 5 * n * D * 5,  # four in a layer, one before the heads
        "FFN or experts": n * 2 * D * HIDDEN,
        "query positions": 3 * projections,  # of 2 D channels
        "heads": n * (2 * D * D + 4 * D + NAMES * D),
        "other": 0,
    }


@pytest.mark.slow
def test_experts_add_the_router_and_the_gated_sum_and_nothing_else(script):
    dense, x16 = (script[1]["models"][name]["flops"] for name in ("dense", "x16"))
    router, gated_sum = QUERIES * LAYERS * EXPERTS * D, QUERIES * LAYERS * 2 * D
    assert x16["stages"]["decoder"] == dense["stages"]["decoder"] + router + gated_sum
    assert x16["total"] == dense["total"] + router + gated_sum
    assert x16["routers"] == router and dense["routers"] == 0
    wide = script[1]["models"]["wide"]["flops"]
    more = QUERIES * LAYERS * 2 * D * (EXPERTS // 2 - 1) * HIDDEN
    assert wide["total"] == dense["total"] + more


@pytest.mark.slow
def test_parameters(script):
    dense, x16 = (script[1]["models"][name]["parameters"] for name in ("dense", "x16"))
    expert, router = 2 * D * HIDDEN // 2 + HIDDEN // 2 + D, EXPERTS * D
    ffn = 2 * D * HIDDEN + HIDDEN + D
    assert dense["active"] == dense["total"] > dense["trainable"]  # the towers are frozen
    assert x16["total"] - dense["total"] == LAYERS * (EXPERTS * expert + router - ffn)
    assert x16["active"] - dense["active"] == LAYERS * (2 * expert + router - ffn)
    assert x16["total"] > x16["active"] > x16["trainable"] > LAYERS * EXPERTS * expert
    wide = script[1]["models"]["wide"]["parameters"]
    units = EXPERTS // 2 * HIDDEN
    assert wide["total"] - dense["total"] == LAYERS * (units - HIDDEN) * (2 * D + 1)


@pytest.mark.slow
def test_the_table_says_what_it_counts(script):
    text, report = script
    assert "nano_x16_stamps.py, 320 x 320" in text and "one multiply-add counted as one" in text
    assert "router's share" in text
    assert "paper" not in text and not report["paper"]  # nano isn't in it
    assert report["versions"]["fvcore"] and f"num_layers={LAYERS}" in report["command"]
    assert report["settings"]["size"] == [320, 320]


def test_a_wrong_override_ends_with_its_message():
    with pytest.raises(SystemExit, match="did you mean model.decoder.layer"):
        flops.main(["model.decoder.layers=3"])


def test_saves_beside_the_other_results():
    assert flops.parse(["--save"]).json == tables.RESULTS / "cpu" / "flops.json"
