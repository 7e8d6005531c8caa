"""What only the Triton back-end has: ways to cut the work, recomputation, being an operator."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from dynamic_dino_kernels import expert_ffn
from dynamic_dino_kernels.moe.ops import expert_ffn_backward_op, expert_ffn_op, triton_ffn
from dynamic_dino_kernels.moe.precision import precision_of
from dynamic_dino_kernels.moe.tiles import Problem, Tiles, choose_tiles, pinned_tiles
from helpers.processes import run_python

NAMES = ("x", "w1", "b1", "w2", "b2", "gates")


def draw(tokens, slots=2, experts=3, dim=40, hidden=50, dtype=torch.float64):
    shapes = [(tokens, dim), (experts, hidden, dim), (experts, hidden), (experts, dim, hidden)]
    args = [torch.randn(shape, dtype=dtype) for shape in (*shapes, (experts, dim))]
    args[1] /= dim**0.5
    args[3] /= hidden**0.5
    gates = torch.rand(tokens, slots, dtype=dtype)
    ids = torch.randint(-1, experts, (tokens, slots), dtype=torch.int32)
    return [t.requires_grad_() for t in (*args, gates)], ids


def run(args, ids, activation="relu"):
    *args, gates = args
    return triton_ffn(*args, ids, gates, activation)


def check(args, ids):
    y = run(args, ids)
    *rest, gates = args
    expected = expert_ffn(*rest, ids, gates, backend="sequential")
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, args, dy)
    for name, grad, want in zip(NAMES, grads, torch.autograd.grad(expected, args, dy), strict=True):
        torch.testing.assert_close(grad, want, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33])
def test_tiles_more_and_less_than_full(tokens):
    args, ids = draw(tokens, slots=1)
    with pinned_tiles(Tiles(rows=16, hidden=16)):
        check(args, ids.clamp(min=0) * 0 + 1)


@pytest.mark.slow
@pytest.mark.parametrize("splits", [2, 4])
def test_hidden_units_shared_by_several_programs(splits):
    with pinned_tiles(Tiles(rows=16, hidden=16, splits=splits)):
        check(*draw(21))
        check(*draw(5, hidden=17))


@pytest.mark.slow
def test_two_gemms():
    with pinned_tiles(Tiles("two_gemms", rows=16)):
        check(*draw(21))
        args, ids = draw(9)
        with torch.no_grad():
            *rest, gates = args
            expected = expert_ffn(*rest, ids, gates, backend="sequential")
            torch.testing.assert_close(run(args, ids), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "form, splits, biases",
    [
        ("fused", 1, False),
        ("fused", 3, True),  # one of the three adds the second
        ("two_gemms", 1, False),
        ("two_gemms", 1, True),
    ],
)
def test_gated_in_all_forms(form, splits, biases):
    """Tiles of 32 rows of W1 are 16 units, 50 units are four of those: splits are uneven."""
    args, ids = draw(21)
    x, _, b1, w2, b2, gates = args
    w1 = (torch.randn(3, 100, 40, dtype=x.dtype) / 40**0.5).requires_grad_()
    b1 = torch.cat((b1, b1 * 2 + 1), 1).detach().requires_grad_()
    weights = (w1, b1, w2, b2) if biases else (w1, None, w2, None)
    tensors = [t for t in (x, *weights, gates) if t is not None]
    expected = expert_ffn(x, *weights, ids, gates, activation="swiglu", backend="sequential")
    dy = torch.randn_like(expected)
    wants = torch.autograd.grad(expected, tensors, dy)
    for recompute in (False, True):
        with pinned_tiles(Tiles(form, 16, 32, splits), Tiles("fused", 16, 32, splits)):
            y = triton_ffn(x, *weights, ids, gates, "swiglu", recompute)
            torch.testing.assert_close(y, expected)
            for grad, want in zip(torch.autograd.grad(y, tensors, dy), wants, strict=True):
                torch.testing.assert_close(grad, want)
    with torch.no_grad(), pinned_tiles(Tiles(form, 16, 32, splits)):
        y = triton_ffn(x, *weights, ids, gates, "swiglu")
    torch.testing.assert_close(y, expected)


def test_gated_without_routing_gates():
    """All gates are 1, and have no gradient."""
    args, ids = draw(13)
    x, _, _, w2, _, gates = args
    w1 = torch.randn(3, 100, 40, dtype=x.dtype, requires_grad=True)
    tensors = (x, w1, w2)
    ones = torch.ones_like(gates)
    expected, y = (
        expert_ffn(x, w1, None, w2, None, ids, g, activation="geglu", backend=backend)
        for g, backend in ((ones, "sequential"), (None, "triton"))
    )
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    grads, wants = (torch.autograd.grad(t, tensors, dy) for t in (y, expected))
    for grad, want in zip(grads, wants, strict=True):
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_one_expert_is_the_dense_ffn(activation):
    args, _ = draw(19, slots=1, experts=1, dtype=torch.float32)
    x, w1, b1, w2, b2, _ = args
    ids, gates = torch.zeros(19, 1, dtype=torch.int32), torch.ones(19, 1)
    y = expert_ffn(x, w1, b1, w2, b2, ids, gates, activation=activation, backend="triton")
    dense = F.linear(getattr(F, activation)(F.linear(x, w1[0], b1[0])), w2[0], b2[0])
    torch.testing.assert_close(y, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_operator_checks():
    args, ids = draw(5, dim=8, hidden=12, dtype=torch.float32)  # no two sizes are equal
    ids = ids.clamp(min=0)  # the hidden layer of an empty slot is never written, nor read
    *rest, gates = args
    norm = (torch.randn(5, 8), torch.randn(8), torch.randn(8))
    for save_hidden, tail in ((False, (None, None, None)), (True, norm)):
        options = (None, *tail, 1e-5, "relu", True, save_hidden)
        torch.library.opcheck(expert_ffn_op, (*rest, ids, gates, *options))
    x, w1, _, w2, _ = rest
    gated = (x, w1, None, w2[:, :, :6].detach().contiguous().requires_grad_(), None, ids, gates)
    torch.library.opcheck(expert_ffn_op, (*gated, *[None] * 4, 0.0, "swiglu", True, True))
    with torch.no_grad():
        _, *plan, z, _, _ = expert_ffn_op(*rest, ids, gates, *[None] * 4, 0.0, "relu", True, True)
        dy = torch.randn_like(rest[0])
        inputs = (dy, *(t.detach() for t in rest), ids, gates.detach(), *plan, z, "relu", True)
        torch.library.opcheck(expert_ffn_backward_op, inputs)


PRECISIONS = """
import os
import torch
from dynamic_dino_kernels.launch import GPU, recorded_launches
from dynamic_dino_kernels.moe.ops import forward

def precisions():
    for dtype in (torch.float32, torch.float16):
        shapes = [(9, 8), (3, 6, 8), (3, 6), (3, 8, 6), (3, 8), (9, 2)]
        *args, gates = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
        ids = torch.empty(9, 2, dtype=torch.int32, device="meta")
        with recorded_launches(GPU("sm_90", 132, 232448)) as launches:
            forward(*args, ids, gates, *[None] * 4, 0.0, "relu", False, False)
        yield from (meta["PRECISION"] for _, _, meta in launches if "PRECISION" in meta)

for setting, value in SETTINGS:
    if os.fork() == 0:
        if setting:
            setattr(torch.backends.cuda.matmul, setting, value)
        print(setting, value, *precisions(), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
def test_tf32_is_pytorchs_choice():
    """Both ways to set it, each in a process of its own: PyTorch doesn't let them be mixed."""
    expected = {
        ("fp32_precision", "tf32"): ["tf32"],
        ("fp32_precision", "ieee"): ["ieee"] * 2,  # launches of the FFN
        ("allow_tf32", True): ["tf32"],
        ("allow_tf32", False): ["ieee"] * 2,
        (None, None): ["tf32x3"] * 2,  # nothing is set: three products are the fastest way here
    }
    code = PRECISIONS.replace("SETTINGS", repr(list(expected)))
    done = run_python("-c", code)
    lines = [" ".join(map(str, [*setting, *half, "ieee"])) for setting, half in expected.items()]
    assert done.stdout.splitlines() == lines, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 900, 3601])
@pytest.mark.parametrize("form", ["fused", "two_gemms"])
def test_detector_sizes_on_the_gpu(tokens, dtype, form):
    """Forward and gradients against float64, and what CUDA graphs need: no synchronisation.

    With an activation that has no kink: on which side of one a unit falls is decided by rounding.
    """
    args, ids = draw(tokens, 2, 16, 256, 1024, dtype=torch.float64)
    low = [a.detach().to(dtype).requires_grad_() for a in args]
    *exact, gates = [a.detach().double().requires_grad_() for a in low]
    expected = expert_ffn(*exact, ids, gates, activation="silu", backend="grouped")
    precision = precision_of(low[0])
    problem = Problem(2 * tokens, 16, 256, 1024, dtype, top_k=2, precision=precision)
    tiles = choose_tiles(problem, ids.device)
    if (
        form == "fused" and tiles.form != form
    ):  # what is right for two launches is too large for one
        tiles = Tiles(rows=16, hidden=16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pinned_tiles(replace(tiles, form=form)):
            y = run(low, ids, "silu")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tolerance = 30 * torch.finfo(dtype).eps
    assert (y.double() - expected).norm() <= tolerance * expected.norm()
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, low, dy)
    wants = torch.autograd.grad(expected, (*exact, gates), dy.double())
    for name, grad, want in zip(NAMES, grads, wants, strict=True):
        assert (grad.double() - want).norm() <= tolerance * want.norm(), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ["fused", "two_gemms"])
@pytest.mark.parametrize("recompute", [False, True])
def test_gated_sizes_on_the_gpu(dtype, form, recompute):
    """Forward and gradients of SwiGLU without biases against float64."""
    (x, w1, _, w2, _, gates), ids = draw(900, 2, 16, 256, 1024)
    exact = [t.detach().to(dtype).double() for t in (x, w1, w2[:, :, :512], gates)]
    exact = [t.contiguous().requires_grad_() for t in exact]
    low = [t.detach().to(dtype).requires_grad_() for t in exact]
    x, w1, w2, gates = exact
    expected = expert_ffn(x, w1, None, w2, None, ids, gates, activation="swiglu", backend="grouped")
    x, w1, w2, gates = low
    with pinned_tiles(
        replace(choose_tiles(Problem(1800, 16, 256, 1024, dtype), ids.device), form=form),
        choose_tiles(Problem(1800, 16, 256, 1024, dtype, backward=True), ids.device),
    ):
        y = triton_ffn(x, w1, None, w2, None, ids, gates, "swiglu", recompute)
        dy = torch.randn_like(y)
        grads = torch.autograd.grad(y, low, dy)
    tolerance = 30 * torch.finfo(dtype).eps
    assert (y.double() - expected).norm() <= tolerance * expected.norm()
    wants = torch.autograd.grad(expected, exact, dy.double())
    for grad, want in zip(grads, wants, strict=True):
        assert (grad.double() - want).norm() <= tolerance * want.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graph_follows_new_routings():
    args, ids = draw(900, 2, 16, 256, 1024, dtype=torch.float16)
    with torch.no_grad():
        run(args, ids)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run(args, ids)
        for _ in range(3):
            ids.copy_(torch.randint(-1, 16, ids.shape))
            y.zero_()
            graph.replay()
            torch.testing.assert_close(y, run(args, ids))
