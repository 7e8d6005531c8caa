"""Linear layers and experts on weights packed for oneDNN, against float64 and the plain ones."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from dynamic_dino_kernels import expert_ffn, packing
from dynamic_dino_kernels.moe.packed import expert_gain, pack_experts
from dynamic_dino_kernels.packing import POST_OPS, PackedWeight, gain, obstacle, packed_linear

pytestmark = pytest.mark.skipif(obstacle() != "", reason=obstacle() or "packs")

EXACT = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@pytest.mark.parametrize("activation", POST_OPS)
@pytest.mark.parametrize(
    "shape", [(5, 7), (1, 7), (0, 7), (7,), (2, 3, 7), (2, 0, 7), (3, 1, 2, 7), (130, 7)]
)
def test_linear_layers(shape, activation):
    x, weight, bias = torch.randn(shape), torch.randn(33, 7), torch.randn(33)
    expected = EXACT[activation](F.linear(x.double(), weight.double(), bias.double())).float()
    for rows in (0, 1, 64, 1000):
        packed = PackedWeight(weight, rows)
        y = packed_linear(x, packed, bias, activation)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y = packed_linear(x, packed, None, activation)
    want = EXACT[activation](F.linear(x.double(), weight.double())).float()
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[::2],
        lambda x: x[:, 1:, 3:],
        lambda x: x[..., ::2],
        lambda x: x[:1].expand(4, -1, -1),
    ],
)
def test_views_of_any_strides(view):
    x = view(torch.randn(6, 9, 64))
    weight, bias = torch.randn(18, x.shape[-1]).t().contiguous().t(), torch.randn(18)
    kept = x.clone()
    y = packed_linear(x, PackedWeight(weight, 8), bias, "relu")
    torch.testing.assert_close(y, F.linear(x, weight, bias).relu(), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, kept) and y.is_contiguous()


def test_the_weight_comes_back_bit_for_bit():
    weight = torch.randn(1025, 67)
    packed = PackedWeight(weight, 900)
    for again in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(again.dense(), weight) and again.shape == weight.shape


def test_where_packed_weights_do_not_apply_the_plain_ones_are_taken(monkeypatch):
    weight, bias = torch.randn(6, 5), torch.randn(6)
    packed, x = PackedWeight(weight, 4), torch.randn(3, 5, requires_grad=True)
    plain = F.linear(x, weight, bias)
    y = packed_linear(x, packed, bias)
    assert torch.equal(y, plain)
    assert torch.equal(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (y, plain)))
    with torch.autocast("cpu", torch.bfloat16):
        y = packed_linear(x.detach(), packed, bias)
        assert y.dtype == torch.bfloat16 and torch.equal(y, F.linear(x, weight, bias))
    with pytest.raises(RuntimeError):  # as nn.Linear would
        packed_linear(x.double(), packed, bias)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False, raising=False)
    monkeypatch.setattr(packing, "multiply", None)
    assert torch.equal(packed_linear(x.detach(), packed, bias), plain)


class Model(torch.nn.Module):
    def __init__(self, experts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x, ids, gates):
        return self.experts(x, ids, gates)


def random_experts(experts=4, hidden=24, dim=16):
    sizes = (experts, hidden, dim), (experts, hidden), (experts, dim, hidden), (experts, dim)
    return [torch.randn(size) for size in sizes]


def random_routing(tokens, experts, top_k, empty=0.2):
    ids = torch.rand(tokens, experts).argsort(1)[:, :top_k].int()
    return ids.masked_fill(torch.rand(ids.shape) < empty, -1), torch.rand(tokens, top_k)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize(
    "tokens, experts, top_k, hidden, dim",
    [
        (50, 4, 2, 24, 16),
        (1, 4, 2, 24, 16),
        (0, 4, 2, 24, 16),
        (3, 16, 1, 7, 5),
        (70, 3, 3, 1, 1),
        (900, 2, 2, 33, 65),
        (20, 5, 0, 8, 8),
    ],
)
@pytest.mark.parametrize("empty", [0, 0.3, 1])
def test_experts(tokens, experts, top_k, hidden, dim, activation, empty):
    weights = random_experts(experts, hidden, dim)
    x, (ids, gates) = torch.randn(tokens, dim), random_routing(tokens, experts, top_k, empty)
    packed = pack_experts(*weights, activation=activation, rows=3)
    doubles = [t.double() for t in (x, *weights)]
    norm = torch.randn(dim), torch.randn(dim), 1e-5
    for tail in (None, norm):
        double_norm = tail and (norm[0].double(), norm[1].double(), 1e-5)
        want = expert_ffn(
            *doubles, ids, gates.double(), activation=activation, norm=double_norm,
            backend="sequential",
        )  # fmt: skip
        y = packed(x, ids, gates, norm=tail)
        assert y.dtype == torch.float32
        if dim > 1 or tail is None:  # the norm of one value is its sign, or noise
            torch.testing.assert_close(y.double(), want, rtol=1e-3, atol=1e-4)
    for mine, given in zip(packed.dense(), weights, strict=True):
        assert torch.equal(mine, given)


def test_all_tokens_may_go_to_one_expert():
    weights, x = random_experts(), torch.randn(300, 32)[:, ::2]
    x = x.contiguous()
    ids, gates = torch.full((300, 1), 2, dtype=torch.int64), torch.ones(300, 1)
    want = expert_ffn(x, *weights, ids, gates, backend="grouped")
    torch.testing.assert_close(pack_experts(*weights)(x, ids, gates), want, rtol=1e-4, atol=1e-4)


def test_experts_with_gradients_and_autocast_are_the_plain_ones():
    weights, x = random_experts(), torch.randn(9, 16, requires_grad=True)
    (ids, gates), packed = random_routing(9, 4, 2), pack_experts(*weights)
    y, want = packed(x, ids, gates), expert_ffn(x, *weights, ids, gates)
    assert torch.equal(y, want)
    assert torch.equal(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (y, want)))
    gates.requires_grad_()
    assert packed(x.detach(), ids, gates).requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = packed(x, ids, gates)
        assert torch.equal(y, expert_ffn(x, *weights, ids, gates)) and y.dtype == torch.bfloat16


def test_threads_share_packed_experts():
    packed = pack_experts(*random_experts(16, 64, 32))
    inputs = [(torch.randn(n, 32), *random_routing(n, 16, 2)) for n in range(40)]
    expected = [packed(*given) for given in inputs]
    with ThreadPoolExecutor(4) as pool:
        for y, want in zip(pool.map(lambda given: packed(*given), inputs), expected, strict=True):
            assert torch.equal(y, want)


@torch.no_grad()
def test_traces_take_the_plain_weights():
    weights, x = random_experts(), torch.randn(9, 16)
    (ids, gates), model = random_routing(9, 4, 2), Model(pack_experts(*weights))
    want = expert_ffn(x, *weights, ids, gates)
    exported = torch.export.export(model, (x, ids, gates))
    assert "mkldnn" not in exported.graph_module.code
    torch.testing.assert_close(exported.module()(x, ids, gates), want)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x, ids, gates), want)
    with pytest.raises(RuntimeError, match="can't be traced by torch.jit.*pack='never'"):
        torch.jit.trace(model, (x, ids, gates))


def test_errors_name_what_is_wrong():
    weights = random_experts()
    packed, (ids, gates) = pack_experts(*weights), random_routing(9, 4, 2)
    with pytest.raises(ValueError, match="^w1 must be"):
        packed(torch.randn(9, 15), ids, gates)
    with pytest.raises(ValueError, match="^expert_ids must lie in"):
        packed(torch.randn(9, 16), ids + 4, gates)
    with pytest.raises(ValueError, match="can't be packed: the weights are float64, not float32"):
        pack_experts(*(w.double() for w in weights))
    with pytest.raises(ValueError, match="can't be packed: oneDNN has no activation 'tanh'"):
        pack_experts(*weights, activation="tanh")


def test_what_cannot_be_packed(monkeypatch):
    assert obstacle("cuda") == "the weights are on cuda, not on a CPU"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert obstacle() == "this PyTorch is built without oneDNN"


def test_the_gain_is_measured_once():
    torch.manual_seed(seed := 5)
    first = gain(3, 8, 16, "relu")
    assert first > 0 and gain(3, 8, 16, "relu") == first
    assert torch.initial_seed() == seed and torch.equal(
        torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(seed))
    ), "seeds are left alone"
    assert expert_gain(3, 8, 16) == pytest.approx(2 / (1 / first + 1 / gain(3, 16, 8)))
