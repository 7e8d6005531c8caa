import pytest
import torch
import torch.nn.functional as F
from dynamic_dino_kernels import expert_ffn, resolve_backend, route, warmup
from helpers.ffn_arguments import random_arguments
from torch.utils._python_dispatch import TorchDispatchMode

BACKENDS = ("sequential", "grouped", "triton")
ON_GPU = torch.cuda.is_available()
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
NAMES = ("x", "w1", "b1", "w2", "b2", "gates")


def draw(tokens, slots, experts, dim=7, hidden=10, dtype=torch.float64):
    """Arguments of expert_ffn with gradients on; ids are distinct in a row, as a top-k's are."""
    args, ids = random_arguments(tokens, slots, experts, dim, hidden, dtype)
    return {name: tensor.requires_grad_() for name, tensor in args.items()}, ids


def run(args, ids, **options):
    args = dict(args)
    gates = args.pop("gates")
    return expert_ffn(**args, expert_ids=ids, gates=gates, **options)


def per_token(args, ids, activation="relu"):
    """The definition, one token and one slot at a time, in float64."""
    args = {name: tensor.double() for name, tensor in args.items()}
    act = ACTIVATIONS[activation]
    rows = []
    for t, row in enumerate(ids.tolist()):
        y = args["x"][t] * 0
        for k, e in enumerate(row):
            if e >= 0:
                hidden = act(args["w1"][e] @ args["x"][t] + args["b1"][e])
                y = y + args["gates"][t, k] * (args["w2"][e] @ hidden + args["b2"][e])
        rows.append(y)
    return torch.stack(rows) if rows else args["x"] * 1


def gradients(y, args, dy):
    grads = torch.autograd.grad(y, list(args.values()), dy, allow_unused=True)
    return {
        name: torch.zeros_like(args[name]) if grad is None else grad
        for name, grad in zip(args, grads, strict=True)
    }


def check(args, ids, **options):
    """Forward and all gradients against the definition."""
    expected = per_token(args, ids, options.get("activation", "relu"))
    dy = torch.randn_like(expected)
    expected_grads = gradients(expected, args, dy) if len(ids) else None
    for backend in BACKENDS:
        y = run(args, ids, backend=backend, **options)
        torch.testing.assert_close(y, expected.to(y.dtype), msg=lambda m: f"{backend}: {m}")  # noqa: B023
        grads = torch.autograd.grad(y, list(args.values()), dy.to(y.dtype))
        for name, grad in zip(args, grads, strict=True):
            want = torch.zeros_like(grad) if expected_grads is None else expected_grads[name]
            torch.testing.assert_close(grad, want, msg=lambda m: f"{backend}, {name}: {m}")  # noqa: B023


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_matches_the_definition(slots, activation):
    check(*draw(tokens=23, slots=slots, experts=5), activation=activation)


@pytest.mark.slow
@pytest.mark.parametrize("tokens, slots, experts", [(1, 1, 1), (1, 3, 3), (9, 7, 7), (40, 2, 16)])
def test_sizes_at_the_edge(tokens, slots, experts):
    check(*draw(tokens, slots, experts))


@pytest.mark.slow
def test_empty_slots_contribute_nothing_even_with_a_gate():
    args, ids = draw(tokens=31, slots=4, experts=6)
    ids[torch.rand(ids.shape) < 0.5] = -1
    ids[3] = -1
    check(args, ids)
    for backend in BACKENDS:
        y = run(args, ids, backend=backend)
        assert (y[3] == 0).all()
        with torch.no_grad():
            filled = ids >= 0
            other = args | {"gates": torch.where(filled, args["gates"], torch.nan)}
        assert torch.equal(run(other, ids, backend=backend), y)


def test_all_slots_empty():
    args, ids = draw(tokens=6, slots=2, experts=3)
    check(args, torch.full_like(ids, -1))


def test_no_tokens_and_no_slots():
    for tokens, slots in ((0, 2), (5, 0), (0, 0)):
        args, ids = draw(tokens, slots, experts=3)
        for backend in BACKENDS:
            y = run(args, ids, backend=backend)
            assert y.shape == (tokens, 7) and (y == 0).all()
            y.sum().backward()
            for tensor in args.values():
                assert tensor.grad is not None and (tensor.grad == 0).all()
                tensor.grad = None


def test_one_expert_gets_everything_and_the_idle_ones_get_zero_gradients():
    args, ids = draw(tokens=12, slots=1, experts=4)
    ids.fill_(2)
    check(args, ids)
    for backend in BACKENDS:
        grads = gradients(run(args, ids, backend=backend), args, torch.randn(12, 7).double())
        for name in ("w1", "b1", "w2", "b2"):
            assert (grads[name][[0, 1, 3]] == 0).all() and (grads[name][2] != 0).any()


def test_the_same_expert_twice_in_a_row_counts_twice():
    args, ids = draw(tokens=8, slots=3, experts=4)
    ids[:, 2] = ids[:, 0]
    check(args, ids)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    args, ids = draw(tokens=5, slots=2, experts=4, dim=3, hidden=4)
    ids[0, 1] = ids[2, 0] = -1
    # Triton's derivatives of the others are compared with the reference's: its interpreter is slow.
    for backend in BACKENDS if activation == "relu" else [b for b in BACKENDS if b != "triton"]:
        torch.autograd.gradcheck(
            lambda *values: run(
                dict(zip(NAMES, values, strict=True)),
                ids,
                activation=activation,
                backend=backend,  # noqa: B023
            ),
            tuple(args[name] for name in NAMES),
            fast_mode=backend == "triton",
        )


@pytest.mark.parametrize("frozen", NAMES)
def test_frozen_arguments_get_no_gradient_and_change_no_other(frozen):
    args, ids = draw(tokens=11, slots=2, experts=4)
    dy = torch.randn(11, 7, dtype=torch.float64)
    full = gradients(run(args, ids, backend="grouped"), args, dy)
    args[frozen] = args[frozen].detach()
    trained = {name: tensor for name, tensor in args.items() if name != frozen}
    some = gradients(run(args, ids, backend="grouped"), trained, dy)
    for name, grad in some.items():
        torch.testing.assert_close(grad, full[name], rtol=0, atol=0)


def backends_of(dtype):
    """Triton's interpreter computes bfloat16 wrongly (triton issue 11584)."""
    return BACKENDS[:2] if dtype == torch.bfloat16 and not ON_GPU else BACKENDS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions(dtype):
    args, ids = draw(tokens=33, slots=2, experts=4, dtype=dtype)
    expected = per_token(args, ids)
    tolerance = 20 * torch.finfo(dtype).eps
    dy = torch.randn_like(expected)
    expected_grads = gradients(expected, args, dy)
    for backend in backends_of(dtype):
        y = run(args, ids, backend=backend)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
        grads = gradients(y, args, dy.to(dtype))
        for name, grad in grads.items():
            assert grad.dtype == dtype
            error = (grad - expected_grads[name]).double().norm()
            assert error <= tolerance * expected_grads[name].double().norm(), name


def test_float32_gates_with_half_precision_tokens_get_float32_gradients():
    args, ids = draw(tokens=9, slots=2, experts=4, dtype=torch.float16)
    args["gates"] = torch.rand(9, 2, requires_grad=True)
    for backend in BACKENDS:
        y = run(args, ids, backend=backend)
        (grad,) = torch.autograd.grad(y.float().sum(), args["gates"])
        assert y.dtype == torch.float16 and grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_runs_in_the_autocast_dtype_and_returns_float32_gradients(backend, device):
    args, ids = draw(tokens=20, slots=2, experts=4, dtype=torch.float32)
    with torch.autocast(device, torch.float16):
        y = run(args, ids, backend=backend)
    low = {name: t if name == "gates" else t.half() for name, t in args.items()}
    assert y.dtype == torch.float16
    assert torch.equal(y, run(low, ids, backend=backend))
    for name, grad in gradients(y, args, torch.randn_like(y)).items():
        assert grad.dtype == torch.float32 and grad.norm() > 0, name

    double, ids = draw(tokens=4, slots=2, experts=4)
    with torch.autocast(device, torch.float16):
        assert run(double, ids, backend=backend).dtype == torch.float64


@pytest.mark.slow
def test_backends_agree_and_repeat_themselves_bit_for_bit():
    args, ids = draw(tokens=200, slots=2, experts=16, dim=32, hidden=48, dtype=torch.float32)
    dy = torch.randn(200, 32)
    results = []
    for backend in ("grouped", "grouped", "triton", "triton", "sequential"):
        y = run(args, ids, backend=backend)
        results.append([y, *gradients(y, args, dy).values()])
    for grouped, again, triton, triton_again, sequential in zip(*results, strict=True):
        assert torch.equal(grouped, again) and torch.equal(triton, triton_again)
        torch.testing.assert_close(grouped, sequential, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(triton, sequential, rtol=1e-4, atol=1e-4)


def test_accepts_what_training_hands_over():
    """Rows of a larger tensor, gates of a transposed one, int64 ids, gradients of a broadcast."""
    args, ids = draw(tokens=10, slots=2, experts=4)
    wide = torch.randn(10, 12, dtype=torch.float64)
    views = args | {"x": wide[:, 3:10], "gates": args["gates"].detach().t().contiguous().t()}
    for tensor in ("x", "gates"):
        views[tensor] = views[tensor].detach().requires_grad_()
    assert not views["x"].is_contiguous() and not views["gates"].is_contiguous()
    check(views, ids.long())
    for backend in BACKENDS:
        run(views, ids, backend=backend).sum().backward()
    with torch.no_grad():
        assert torch.equal(run(views, ids), run(views, ids.long()))


def test_nan_stays_nan_in_its_token_only():
    args, ids = draw(tokens=9, slots=2, experts=4)
    with torch.no_grad():
        args["x"][4, 2] = torch.nan
    for backend in BACKENDS:
        bad = run(args, ids, backend=backend).isnan().all(-1)
        assert bad.tolist() == [t == 4 for t in range(9)]


# Norm, recomputation, blocks, casts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dim", [7, 40, 300])
def test_residual_and_layer_norm(dim, dtype):
    """Forward and all gradients against PyTorch's LayerNorm in float64."""
    args, ids = draw(tokens=13, slots=2, experts=4, dim=dim, dtype=dtype)
    ids[3] = -1
    norm = [torch.randn(dim, dtype=dtype, requires_grad=True) for _ in range(2)]
    inputs = (*args.values(), *norm)
    summed = args["x"].double() + per_token(args, ids)
    expected = F.layer_norm(summed, [dim], *(t.double() for t in norm), eps=1e-3)
    dy = torch.randn_like(expected)
    wants = torch.autograd.grad(expected, inputs, dy)
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else {}
    for backend in BACKENDS:
        y = run(args, ids, norm=(*norm, 1e-3), backend=backend)
        torch.testing.assert_close(y, expected.to(dtype), **tolerance)
        for grad, want in zip(torch.autograd.grad(y, inputs, dy.to(dtype)), wants, strict=True):
            torch.testing.assert_close(grad, want, **tolerance)


def test_norm_under_autocast_keeps_the_residual_wide(device):
    """As LayerNorm does there: x isn't rounded to half precision on its way past the experts."""
    args, ids = draw(tokens=9, slots=2, experts=4, dtype=torch.float32)
    norm = [torch.randn(7, requires_grad=True) for _ in range(2)]
    for backend in BACKENDS:
        with torch.autocast(device, torch.float16):
            y = run(args, ids, norm=(*norm, 1e-5), backend=backend)
            ffn = run(args, ids, backend=backend)
            expected = F.layer_norm(args["x"] + ffn, [7], *norm)
        assert y.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(y, expected, rtol=5e-3, atol=5e-3)
        for grad in torch.autograd.grad(y.sum(), (*args.values(), *norm)):
            assert grad.dtype == torch.float32


def test_gradients_where_the_norm_is_in_half_precision():
    args, ids = draw(tokens=9, slots=2, experts=4, dtype=torch.float16)
    norm = [torch.randn(7, dtype=torch.float16, requires_grad=True) for _ in range(2)]
    exact = {name: t.detach().double().requires_grad_() for name, t in args.items()}
    exact_norm = [t.detach().double().requires_grad_() for t in norm]
    y = run(args, ids, activation="silu", norm=(*norm, 1e-5), backend="triton")
    expected = run(exact, ids, activation="silu", norm=(*exact_norm, 1e-5), backend="sequential")
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, (*args.values(), *norm), dy)
    wanted = torch.autograd.grad(expected, (*exact.values(), *exact_norm), dy.double())
    for grad, want in zip(grads, wanted, strict=True):
        assert grad.dtype == torch.float16
        torch.testing.assert_close(
            grad.double(), want, rtol=0.05, atol=0.05 * want.abs().max().item()
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputing_the_hidden_layer_changes_nothing_but_memory(backend):
    args, ids = draw(tokens=21, slots=2, experts=3, dim=40, hidden=50)
    ids[2, 1] = -1
    dy = torch.randn(21, 40, dtype=torch.float64)
    kept, results = [], []
    for recompute in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t,  # noqa: B023
            lambda t: t,
        ):
            y = run(args, ids, recompute=recompute, backend=backend)
        kept.append(sum(sizes))
        results.append([y, *gradients(y, args, dy).values()])
    assert kept[0] - kept[1] >= ids.numel() * 50 * 0.9
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_the_router_change_nothing(backend):
    args, _ = draw(tokens=70, slots=2, experts=4, dtype=torch.float32)
    ids, gates, _, blocks = route(args["x"], torch.randn(4, 7), 2, backend=backend)
    args["gates"] = gates
    assert (blocks is None) == (backend != "triton")
    assert torch.equal(
        run(args, ids, blocks=blocks, backend=backend), run(args, ids, backend=backend)
    )


def test_parameters_are_cast_once_while_nobody_trains_them(device):
    args, ids = draw(tokens=9, slots=2, experts=4, dtype=torch.float32)
    weights = {name: torch.nn.Parameter(args[name].detach()) for name in ("w1", "b1", "w2", "b2")}
    args |= weights
    counted = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, inputs=(), kwargs=None):
            if "_to_copy" in str(function) and inputs[0].dim() == 3:
                counted.append(inputs[0].shape)
            return function(*inputs, **(kwargs or {}))

    def infer():
        counted.clear()
        with torch.no_grad(), torch.autocast(device, torch.float16), Casts():
            y = run(args, ids, backend="grouped")
        return y, len(counted)

    first, casts = infer()
    again, casts_again = infer()
    assert casts == 2 and casts_again == 0 and torch.equal(first, again)
    with torch.no_grad():
        weights["w2"].mul_(2)
    changed, casts = infer()
    assert casts == 1 and not torch.equal(first, changed)
    weights["w1"].data = weights["w1"].data * 3
    assert infer()[1] == 1
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        assert run(args, ids, backend="grouped").dtype == torch.bfloat16
    with torch.autocast(device, torch.float16):
        run(args, ids, backend="grouped").sum().backward()
    assert all(w.grad is not None for w in weights.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("train", [False, True])
def test_warmup_leaves_no_trace(backend, train):
    args, _ = draw(tokens=1, slots=1, experts=4, dtype=torch.float32)
    weights = [args[name] for name in ("w1", "b1", "w2", "b2")]
    before = [w.detach().clone() for w in weights]
    warmup(*weights, top_k=2, tokens=[3, 20], train=train, backend=backend)
    for weight, value in zip(weights, before, strict=True):
        assert weight.grad is None and torch.equal(weight, value)


# Errors


@pytest.mark.parametrize("name", ["w1", "b1", "w2", "b2", "gates"])
def test_wrong_shapes_are_named(name):
    args, ids = draw(tokens=6, slots=2, experts=4)
    args[name] = torch.cat([args[name], args[name]], dim=-1)
    # Sizes are read off x, w1 and expert_ids, so a w1 of another D is itself what doesn't fit.
    with pytest.raises(ValueError, match=rf"^{name} must be"):
        run(args, ids)


def test_wrong_number_of_dimensions_is_named():
    args, ids = draw(tokens=6, slots=2, experts=4)
    with pytest.raises(ValueError, match="^x must be"):
        run(args | {"x": args["x"][None]}, ids)
    with pytest.raises(ValueError, match="^w1 must be"):
        run(args | {"w1": args["w1"][0]}, ids)
    with pytest.raises(ValueError, match="^expert_ids must be"):
        run(args, ids[:, 0])
    with pytest.raises(ValueError, match="^expert_ids must be"):
        run(args, ids[:4])


def test_ids_out_of_range_are_named(monkeypatch):
    monkeypatch.setenv("DYNAMIC_DINO_KERNELS_DEBUG", "1")  # on a GPU they are checked only then
    args, ids = draw(tokens=6, slots=2, experts=4)
    for bad in (4, -2):
        ids[3, 1] = bad
        with pytest.raises(ValueError, match=r"expert_ids must lie in \[-1, 3\]"):
            run(args, ids)


def test_more_slots_than_experts():
    args, _ = draw(tokens=6, slots=3, experts=2)
    with pytest.raises(ValueError, match="K=3 slots, more than the E=2"):
        run(args | {"gates": torch.ones(6, 3).double()}, torch.zeros(6, 3, dtype=torch.int32))


def test_wrong_dtypes_are_named():
    args, ids = draw(tokens=6, slots=2, experts=4)
    for name in ("w1", "b1", "w2", "b2"):
        with pytest.raises(TypeError, match=f"^{name} is torch.float32"):
            run(args | {name: args[name].float()}, ids)
    with pytest.raises(TypeError, match="expert_ids must be int32 or int64"):
        run(args, ids.float())
    with pytest.raises(TypeError, match="gates must be a floating-point"):
        run(args | {"gates": ids}, ids)


def test_non_contiguous_last_dimension_is_named():
    args, ids = draw(tokens=6, slots=2, experts=4)
    for name in ("x", "w1", "w2"):
        turned = args[name].detach().transpose(-1, -2).contiguous().transpose(-1, -2)
        with pytest.raises(ValueError, match=f"last dimension of {name} must be contiguous"):
            run(args | {name: turned}, ids)


def test_norm_of_another_width_is_named():
    args, ids = draw(tokens=6, slots=2, experts=4)
    with pytest.raises(ValueError, match=r"^norm must be .* the shape of its bias is \(8,\)"):
        run(args, ids, norm=(torch.ones(7), torch.ones(8), 1e-5))


def test_unknown_activation():
    args, ids = draw(tokens=6, slots=2, experts=4)
    with pytest.raises(ValueError, match="activation is 'tanh': choose one of relu, gelu, .*geglu"):
        run(args, ids, activation="tanh")


# The choice of the back-end


def test_argument_beats_environment_beats_automatic(monkeypatch):
    assert resolve_backend() == "grouped"
    monkeypatch.setenv("DYNAMIC_DINO_KERNELS", "sequential")
    assert resolve_backend() == "sequential"
    assert resolve_backend("auto") == "sequential"
    assert resolve_backend("grouped") == "grouped"
    monkeypatch.setenv("DYNAMIC_DINO_KERNELS", "auto")
    assert resolve_backend() == "grouped"


def test_unknown_backend_names_its_source_and_the_choices(monkeypatch):
    args, ids = draw(tokens=6, slots=2, experts=4)
    with pytest.raises(ValueError, match="^backend is 'cuda': choose one of auto, sequential"):
        run(args, ids, backend="cuda")
    monkeypatch.setenv("DYNAMIC_DINO_KERNELS", "fast")
    with pytest.raises(ValueError, match="^DYNAMIC_DINO_KERNELS is 'fast'"):
        run(args, ids)


@pytest.mark.skipif(ON_GPU, reason="nothing to refuse")
def test_triton_is_refused_without_cuda(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    args, ids = draw(tokens=6, slots=2, experts=4)
    with pytest.raises(RuntimeError, match="^backend is 'triton', but the tensors are on cpu"):
        run(args, ids, backend="triton")
    monkeypatch.setenv("DYNAMIC_DINO_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="^DYNAMIC_DINO_KERNELS is 'triton'"):
        run(args, ids)
    run(args, ids, backend="grouped")
