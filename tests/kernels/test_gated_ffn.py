"""Gated activations (SwiGLU, GeGLU) and experts without biases, on every back-end."""

import math

import pytest
import torch
from dynamic_dino_kernels import expert_ffn, warmup
from dynamic_dino_kernels.moe import ACTIVATIONS
from dynamic_dino_kernels.moe.grouped import grouped_backward_op, grouped_op
from helpers.ffn_arguments import random_arguments
from torch import nn

BACKENDS = ("sequential", "grouped", "triton")
WEIGHTS = ("w1", "b1", "w2", "b2")
GATED = ("swiglu", "geglu", "geglu_tanh")


def silu(z):
    return z / (1 + torch.exp(-z))


def gelu(z):
    return z * (1 + torch.erf(z / math.sqrt(2))) / 2


def gelu_tanh(z):
    return z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2


DEFINITIONS = {
    "relu": lambda z: z * (z > 0),
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
    "swiglu": lambda z: silu(z[: len(z) // 2]) * z[len(z) // 2 :],
    "geglu": lambda z: gelu(z[: len(z) // 2]) * z[len(z) // 2 :],
    "geglu_tanh": lambda z: gelu_tanh(z[: len(z) // 2]) * z[len(z) // 2 :],
}


def draw(
    activation, tokens=23, slots=2, experts=5, dim=7, hidden=10, dtype=torch.float64, biases=WEIGHTS
):
    """Arguments with gradients on; ids are distinct in a row, some slots empty."""
    rows = hidden * (2 if activation in GATED else 1)
    args, ids = random_arguments(tokens, slots, experts, dim, hidden, dtype, rows)
    args = {name: tensor.requires_grad_() for name, tensor in args.items()}
    args |= {name: None for name in ("b1", "b2") if name not in biases}
    ids[torch.rand(ids.shape) < 0.2] = -1
    return args, ids


def run(args, ids, **options):
    weights = (args[name] for name in WEIGHTS)
    return expert_ffn(args["x"], *weights, ids, args["gates"], **options)


def definition(args, ids, activation):
    """One token and one slot at a time, in float64."""
    args = {name: t if t is None else t.double() for name, t in args.items()}
    bias = {name: 0 if args[name] is None else args[name] for name in ("b1", "b2")}
    rows = []
    for t, row in enumerate(ids.tolist()):
        y = args["x"][t] * 0
        for k, e in enumerate(row):
            if e >= 0:
                b1, b2 = (b if isinstance(b, int) else b[e] for b in bias.values())
                hidden = DEFINITIONS[activation](args["w1"][e] @ args["x"][t] + b1)
                y = y + args["gates"][t, k] * (args["w2"][e] @ hidden + b2)
        rows.append(y)
    return torch.stack(rows)


def given(args):
    return {name: tensor for name, tensor in args.items() if tensor is not None}


def check(args, ids, activation, dtype=torch.float64, backends=BACKENDS, **options):
    """Forward and all gradients against the definition, as distances relative to the norm, or to 1
    where less is left of terms of that size: their sum is as exact as they are."""
    expected = definition(args, ids, activation)
    dy = torch.randn_like(expected)
    tensors = given(args)
    wants = torch.autograd.grad(expected, list(tensors.values()), dy, allow_unused=True)
    tolerance = 50 * torch.finfo(dtype).eps
    for backend in backends:
        y = run(args, ids, activation=activation, backend=backend, **options)
        assert y.dtype == dtype
        assert (y.double() - expected).norm() <= tolerance * expected.norm().clamp(min=1), backend
        grads = torch.autograd.grad(y, list(tensors.values()), dy.to(dtype))
        for name, grad, want in zip(tensors, grads, wants, strict=True):
            assert grad.dtype == tensors[name].dtype and grad.shape == tensors[name].shape
            want = torch.zeros_like(grad) if want is None else want
            error = (grad - want).double().norm()
            assert error <= tolerance * want.double().norm().clamp(min=1), (backend, name)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_the_definition(activation, recompute):
    check(*draw(activation), activation, recompute=recompute)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("biases", [(), ("b1",), ("b2",)])
def test_a_bias_may_be_missing(activation, biases, recompute):
    check(*draw(activation, biases=biases), activation, recompute=recompute)


@pytest.mark.slow
@pytest.mark.parametrize("biases", [(), WEIGHTS])
@pytest.mark.parametrize(
    "tokens, slots, experts, dim, hidden",
    [(1, 1, 1, 1, 1), (1, 3, 3, 17, 1), (40, 2, 16, 16, 33), (9, 7, 7, 3, 64), (70, 1, 2, 40, 5)],
)
def test_sizes_at_the_edge(tokens, slots, experts, dim, hidden, biases):
    check(*draw("swiglu", tokens, slots, experts, dim, hidden, biases=biases), "swiglu")


@pytest.mark.slow
@pytest.mark.parametrize("activation", GATED)
def test_gradcheck(activation):
    args, ids = draw(activation, tokens=5, experts=4, dim=3, hidden=4)
    ids[0, 1] = ids[2, 0] = -1
    # Triton's derivatives of the others are compared with the reference's: its interpreter is slow.
    for backend in BACKENDS if activation == "swiglu" else [b for b in BACKENDS if b != "triton"]:
        torch.autograd.gradcheck(
            lambda *values: run(
                dict(zip(args, values, strict=True)),
                ids,
                activation=activation,
                backend=backend,  # noqa: B023
            ),
            tuple(args.values()),
            fast_mode=backend == "triton",
        )


def test_experts_without_tokens_and_tokens_without_experts():
    args, ids = draw("geglu", biases=())
    ids[ids == 2] = -1
    ids[4] = -1
    check(args, ids, "geglu")
    for tokens, slots in ((0, 2), (5, 0)):
        args, ids = draw("geglu", tokens=tokens, slots=slots, biases=("b2",))
        for backend in BACKENDS:
            y = run(args, ids, activation="geglu", backend=backend)
            assert y.shape == (tokens, 7) and (y == 0).all()
            grads = torch.autograd.grad(y.sum(), list(given(args).values()))
            assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precisions(dtype):
    """Triton's interpreter computes bfloat16 wrongly (triton issue 11584)."""
    unfit = dtype == torch.bfloat16 and not torch.cuda.is_available()
    backends = [b for b in BACKENDS if not (unfit and b == "triton")]
    check(*draw("swiglu", dtype=dtype, biases=()), "swiglu", dtype, backends)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_returns_its_dtype_and_float32_gradients(backend, device):
    args, ids = draw("swiglu", dtype=torch.float32, biases=("b1",))
    with torch.autocast(device, torch.float16):
        y = run(args, ids, activation="swiglu", backend=backend)
    tensors = given(args)
    low = args | {n: t.half() for n, t in tensors.items() if n != "gates"}
    assert y.dtype == torch.float16
    assert torch.equal(y, run(low, ids, activation="swiglu", backend=backend))
    for grad in torch.autograd.grad(y.sum(), list(tensors.values())):
        assert grad.dtype == torch.float32 and grad.norm() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_at_the_end(backend):
    args, ids = draw("geglu", biases=())
    norm = (torch.randn(7).double(), torch.randn(7).double(), 1e-3)
    y = run(args, ids, activation="geglu", norm=norm, backend=backend)
    summed = args["x"] + definition(args, ids, "geglu")
    torch.testing.assert_close(y, nn.functional.layer_norm(summed, (7,), *norm))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_gives_what_training_does(backend):
    """Where nothing is kept, the hidden layer lies elsewhere, in grouped in the gates' place."""
    for activation in ("silu", "swiglu"):
        args, ids = draw(activation, tokens=90, dim=24, hidden=40, dtype=torch.float32)
        y = run(args, ids, activation=activation, backend=backend)
        with torch.no_grad():
            torch.testing.assert_close(y, run(args, ids, activation=activation, backend=backend))


@pytest.mark.parametrize("frozen", ["x", "w1", "w2", "gates"])
def test_frozen_arguments_change_no_other_gradient(frozen):
    for backend in BACKENDS:
        args, ids = draw("swiglu", biases=())
        y = run(args, ids, activation="swiglu", backend=backend)
        dy, tensors = torch.randn_like(y), given(args)
        full = dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), dy), strict=True))
        args[frozen] = args[frozen].detach()
        del tensors[frozen]
        y = run(args, ids, activation="swiglu", backend=backend)
        grads = torch.autograd.grad(y, list(tensors.values()), dy)
        for name, grad in zip(tensors, grads, strict=True):
            torch.testing.assert_close(grad, full[name], rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_warmup_takes_missing_biases(backend):
    args, _ = draw("swiglu", dtype=torch.float32, biases=())
    weights = [args[name] for name in WEIGHTS]
    warmup(*weights, top_k=2, tokens=[3], train=True, activation="swiglu", backend=backend)
    assert args["w1"].grad is None


# Traced


class GatedExperts(nn.Module):
    def __init__(self, backend):
        super().__init__()
        args, _ = draw("swiglu", dim=20, hidden=24, dtype=torch.float32)
        self.w1, self.w2 = (nn.Parameter(args[name].detach()) for name in ("w1", "w2"))
        self.backend = backend

    def forward(self, x, ids, gates):
        weights = (self.w1, None, self.w2, None)
        return expert_ffn(x, *weights, ids, gates, activation="swiglu", backend=self.backend)


def traced_inputs(tokens):
    ids = torch.randint(-1, 5, (tokens, 2), dtype=torch.int32)
    return torch.randn(tokens, 20), ids, torch.rand(tokens, 2)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_compiles_and_exports(backend):
    experts, (x, ids, gates) = GatedExperts(backend), traced_inputs(70)
    x.requires_grad_()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    tensors = (x, *experts.parameters())
    y, expected = compiled(x, ids, gates), experts(x, ids, gates)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    grads, wants = (torch.autograd.grad(t, tensors, dy) for t in (y, expected))
    for grad, want in zip(grads, wants, strict=True):
        torch.testing.assert_close(grad, want)

    tokens = torch.export.Dim("tokens", min=64, max=4096)
    with torch.no_grad():
        program = torch.export.export(experts, traced_inputs(70), dynamic_shapes=[{0: tokens}] * 3)
        other = traced_inputs(81)
        torch.testing.assert_close(program.module()(*other), experts(*other))


def test_operator_checks_of_grouped():
    args, ids = draw("geglu", dtype=torch.float32, biases=("b2",))
    ids = ids.clamp(min=0)  # rows of empty slots are never written, nor read
    tensors = [args["x"], *(args[name] for name in WEIGHTS)]
    for save_hidden in (False, True):
        torch.library.opcheck(
            grouped_op, (*tensors, ids, args["gates"], "geglu", True, save_hidden)
        )
    with torch.no_grad():
        y, *kept = grouped_op(*tensors, ids, args["gates"], "geglu", True, True)
    inputs = [t if t is None else t.detach() for t in (*tensors, ids, args["gates"])]
    torch.library.opcheck(grouped_backward_op, (torch.randn_like(y), *inputs, *kept, "geglu", True))


# Errors


def test_errors_say_which_layout_is_wanted():
    args, ids = draw("swiglu", experts=4)
    cases = [
        # (arguments that replace, activation, message)
        (
            {"w1": args["w1"][:, :19]},
            "swiglu",
            r"^w1 must be \[E, 2H, D\] for 'swiglu', gate half first",
        ),
        ({"w1": args["w1"][:, :10]}, "swiglu", r"^b1 must be \[4, 10\]"),
        (
            {"w1": args["w1"][:, :10], "b1": None},
            "swiglu",
            r"^w2 must be \[4, 7, 5\] .*H=5 \(half the rows of w1, since 'swiglu' is gated\)",
        ),
        ({}, "silu", r"^w2 must be \[4, 7, 20\].*2H rows of w1 go with a gated activation: swiglu"),
        ({"b2": args["b1"]}, "swiglu", r"^b2 must be \[4, 7\]"),
    ]
    for replaced, activation, message in cases:
        for backend in BACKENDS:
            with pytest.raises(ValueError, match=message):
                run(args | replaced, ids, activation=activation, backend=backend)
