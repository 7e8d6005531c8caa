import math

import pytest
import torch
from dynamic_dino_kernels import ms_deform_attn
from dynamic_dino_kernels.deform_attn import gather
from dynamic_dino_kernels.deform_attn.ops import ms_deform_attn_op

SHAPES = [(6, 9), (3, 5), (1, 2)]
both = pytest.mark.parametrize("backend", ["grouped", "triton"])  # grid_sample, Triton


def draw(shapes=SHAPES, batch=2, queries=7, heads=3, head_dim=4, points=2, dtype=torch.float64):
    cells = sum(h * w for h, w in shapes)
    value = torch.randn(batch, cells, heads, head_dim, dtype=dtype, requires_grad=True)
    # Some locations lie outside the map.
    locations = torch.rand(batch, queries, heads, len(shapes), points, 2, dtype=dtype) * 1.4 - 0.2
    weights = torch.randn(batch, queries, heads, len(shapes) * points, dtype=dtype).softmax(-1)
    weights = weights.unflatten(-1, (len(shapes), points))
    return value, locations.requires_grad_(), weights.requires_grad_()


def sample_by_hand(value, shapes, locations, weights):
    """Bilinear interpolation between cell centres, zeros outside; one number at a time."""
    batch, queries, heads, levels, points, _ = locations.shape
    out = torch.zeros(batch, queries, heads, value.shape[-1], dtype=value.dtype)
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(levels)]
    for b, q, m, level, p in torch.cartesian_prod(
        *(torch.arange(n) for n in (batch, queries, heads, levels, points))
    ).tolist():
        height, width = shapes[level]
        x = locations[b, q, m, level, p, 0].item() * width - 0.5
        y = locations[b, q, m, level, p, 1].item() * height - 0.5
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < height and 0 <= column < width:
                    share = (1 - abs(x - column)) * (1 - abs(y - row))
                    cell = value[b, starts[level] + row * width + column, m]
                    out[b, q, m] += weights[b, q, m, level, p] * share * cell
    return out.flatten(2)


@both
@pytest.mark.parametrize("sizes", [{}, {"queries": 1, "heads": 1, "points": 1}, {"queries": 17}])
def test_matches_bilinear_sampling_by_hand(sizes, backend):
    value, locations, weights = draw(**sizes)
    with torch.no_grad():
        expected = sample_by_hand(value, SHAPES, locations, weights)
        result = ms_deform_attn(value, SHAPES, locations, weights, backend=backend)
    torch.testing.assert_close(result, expected)


@pytest.mark.slow
@both
@pytest.mark.parametrize("model", ["grounding_dino", "deformable_detr"])
def test_matches_transformers_forward_and_gradients(model, backend):
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    theirs = module.MultiScaleDeformableAttention()
    args = draw(dtype=torch.float32)
    value, locations, weights = args
    shapes = torch.tensor(SHAPES)
    starts = torch.tensor([0, 54, 69])
    expected = theirs(value, shapes, SHAPES, starts, locations, weights, 64)
    result = ms_deform_attn(value, SHAPES, locations, weights, backend=backend)
    torch.testing.assert_close(result, expected)

    dy = torch.randn_like(result)
    for ours, other in zip(
        torch.autograd.grad(result, args, dy), torch.autograd.grad(expected, args, dy), strict=True
    ):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@both
def test_gradcheck(backend):
    shapes = [(4, 3), (2, 2)]
    args = draw(shapes, batch=1, queries=2, heads=2, head_dim=2)
    torch.autograd.gradcheck(
        lambda *values: ms_deform_attn(values[0], shapes, *values[1:], backend=backend),
        args,
        # Atomic additions don't repeat themselves bit for bit on a GPU.
        nondet_tol=1e-12,
        fast_mode=backend == "triton",  # its interpreter is slow
    )


def test_far_and_undefined_locations_see_nothing():
    value, locations, weights = draw()
    with torch.no_grad():
        locations[:, 0], locations[:, 1], locations[:, 2] = 1e30, -1e30, torch.nan
        gathered = ms_deform_attn(value, SHAPES, locations, weights, backend="grouped")
    y = ms_deform_attn(value, SHAPES, locations, weights, backend="triton")
    for result in (y, gathered):
        assert (result[:, :3] == 0).all() and (result[:, 3:] != 0).any()
    for grad in torch.autograd.grad(y.sum(), (value, locations, weights)):
        assert grad.isfinite().all()


def test_backward_on_triton_says_that_it_is_not_deterministic():
    args = draw()
    y = ms_deform_attn(args[0], SHAPES, *args[1:], backend="triton")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="adds atomically"):
            y.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_operator_checks():
    args = draw(batch=1, queries=3, dtype=torch.float32)
    flat = [size for shape in SHAPES for size in shape]
    torch.library.opcheck(ms_deform_attn_op, (args[0], flat, *args[1:]))


def test_shapes_may_be_a_tensor():
    value, locations, weights = draw()
    torch.testing.assert_close(
        ms_deform_attn(value, torch.tensor(SHAPES), locations, weights),
        ms_deform_attn(value, SHAPES, locations, weights),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("block", [1, 150, 2**18], ids=["one query", "many blocks", "one block"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_gradients_a_cpu_gathers_the_same(dtype, block, monkeypatch):
    monkeypatch.setattr(gather, "BLOCK", block)
    shapes = [(5, 1), (1, 7), (16, 12)]
    args = draw(shapes, queries=50, dtype=dtype)
    expected = ms_deform_attn(args[0], shapes, *args[1:], backend="grouped")
    with torch.no_grad():
        result = ms_deform_attn(args[0], shapes, *args[1:], backend="grouped")
    tolerance = {} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(result, expected, **tolerance)
    # On the border between a map and its outside as well.
    edges = torch.tensor([-0.1, 0.0, 0.05, 0.5, 0.999, 1.0, 1.1], dtype=dtype)
    grid = torch.cartesian_prod(edges, edges).view(1, -1, 1, 1, 1, 2).expand(2, -1, 3, 3, 2, 2)
    args = (args[0], grid.requires_grad_(), args[2][:, :49])
    with torch.no_grad():
        result = ms_deform_attn(args[0], shapes, *args[1:], backend="grouped")
    expected = ms_deform_attn(args[0], shapes, *args[1:], backend="grouped")
    torch.testing.assert_close(result, expected, **tolerance)


@both
def test_no_queries(backend):
    value, locations, weights = draw(queries=0)
    y = ms_deform_attn(value, SHAPES, locations, weights, backend=backend)
    assert y.shape == (2, 0, 12)
    y.sum().backward()
    assert (value.grad == 0).all()


def test_low_precision_values_are_sampled_at_float32_locations(device):
    """On a ramp, the sample is the location: in bfloat16 it would be off by a tenth."""
    width = 64
    ramp = (torch.arange(width).float()).view(1, width, 1, 1)
    locations = (torch.rand(1, 50, 1, 1, 1, 2) * 0.9 + 0.05).float()
    locations[..., 1] = 0.5
    weights = torch.ones(1, 50, 1, 1, 1)
    exact = locations[0, :, 0, 0, 0, :1] * width - 0.5
    with torch.autocast(device, torch.bfloat16):
        assert ms_deform_attn(ramp, [(1, width)], locations, weights).dtype == torch.float32
        y = ms_deform_attn(ramp.bfloat16(), [(1, width)], locations, weights)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y[0], exact.bfloat16(), rtol=0.005, atol=0.001)


def test_errors_name_the_argument():
    value, locations, weights = draw()
    with pytest.raises(ValueError, match="^value must be"):
        ms_deform_attn(value.flatten(2), SHAPES, locations, weights)
    with pytest.raises(ValueError, match="^spatial_shapes .* S=71 cells"):
        ms_deform_attn(value, SHAPES[:2], locations, weights)
    with pytest.raises(ValueError, match="^sampling_locations must be"):
        ms_deform_attn(value, SHAPES, locations[:, :, :2], weights)
    with pytest.raises(ValueError, match="^sampling_locations must be"):
        ms_deform_attn(value, SHAPES, locations[0], weights)
    with pytest.raises(ValueError, match="^attention_weights must be"):
        ms_deform_attn(value, SHAPES, locations, weights.flatten(-2))
