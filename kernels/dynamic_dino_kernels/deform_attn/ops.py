"""Multi-scale deformable attention on Triton as PyTorch operators."""

from __future__ import annotations

import warnings
from functools import cache

import torch
import triton
from torch import Tensor

from ..launch import launch, sum_dtype, sum_type
from ..replay import Replayed, possible
from . import kernels


def triton_ms_deform_attn(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """See `dynamic_dino_kernels.deform_attn.ms_deform_attn`, which has checked the arguments."""
    flat = [size for shape in shapes for size in shape]
    value, locations, weights = (t.contiguous() for t in (value, _wide(locations), _wide(weights)))
    if not torch.compiler.is_compiling() and possible():
        maps = _maps(tuple(flat), value.device)
        if call := _sample.find((value, maps, locations, weights), ()):
            return call()
    return ms_deform_attn_op(value, flat, locations, weights)


def forward(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """shapes: height and width of each level, one after the other. All tensors are contiguous."""
    return _launch_forward(value, _maps(tuple(shapes), value.device), locations, weights)


def _launch_forward(value: Tensor, maps: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    batch, cells, heads, channels = value.shape
    queries = locations.shape[1]
    out = value.new_empty(batch, queries, heads * channels)
    launch(
        kernels.sample_forward, _grid(value, queries),
        *(value, maps, locations, weights, out, cells, queries),
        **_meta(value, locations, weights),
    )  # fmt: skip
    return out


_sample = Replayed(_launch_forward)


def backward(
    dout: Tensor, value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights.

    That of the value is summed by atomic additions in float32: its last bits depend on their order.
    """
    if torch.are_deterministic_algorithms_enabled():
        _alert_not_deterministic()
    cells, queries = value.shape[1], locations.shape[1]
    dvalue = torch.zeros_like(value, dtype=sum_dtype(value, locations, weights))
    dlocations, dweights = torch.empty_like(locations), torch.empty_like(weights)
    launch(
        kernels.sample_backward, _grid(value, queries),
        *(value, _maps(tuple(shapes), value.device), locations, weights, dout),
        *(dvalue, dlocations, dweights, cells, queries),
        **_meta(value, locations, weights),
    )  # fmt: skip
    return dvalue.to(value.dtype), dlocations, dweights


ms_deform_attn_op = torch.library.custom_op(
    "dynamic_dino::ms_deform_attn", forward, mutates_args=()
)
ms_deform_attn_backward_op = torch.library.custom_op(
    "dynamic_dino::ms_deform_attn_backward", backward, mutates_args=()
)


@ms_deform_attn_op.register_fake
def _(value, shapes, locations, weights):
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, locations.shape[1], heads * channels)


@ms_deform_attn_backward_op.register_fake
def _(dout, value, shapes, locations, weights):
    return torch.empty_like(value), torch.empty_like(locations), torch.empty_like(weights)


def _setup_context(ctx, inputs, output) -> None:
    value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _differentiate(ctx, dout):
    value, locations, weights = ctx.saved_tensors
    dvalue, dlocations, dweights = ms_deform_attn_backward_op(
        dout.contiguous(), value, ctx.shapes, locations, weights
    )
    return dvalue, None, dlocations, dweights


ms_deform_attn_op.register_autograd(_differentiate, setup_context=_setup_context)


@cache
def _maps(shapes: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [L, 3]: height, width and first cell of each level. Cached: the copy to the GPU would
    stop a stream that CUDA graphs capture."""
    rows, first = [], 0
    for height, width in zip(shapes[::2], shapes[1::2], strict=True):
        rows.append((height, width, first))
        first += height * width
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _alert_not_deterministic() -> None:
    """As PyTorch's own operators do, grid_sample's backward pass among them."""
    message = (
        "the backward pass of ms_deform_attn on Triton adds atomically, so it isn't deterministic, "
        "but torch.use_deterministic_algorithms is on: switch it off, or let it warn only"
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)


def _grid(value: Tensor, queries: int) -> tuple[int, int]:
    return triton.cdiv(queries, 16), value.shape[0] * value.shape[2]


def _meta(value: Tensor, locations: Tensor, weights: Tensor) -> dict:
    (_, _, heads, channels), (levels, points) = value.shape, weights.shape[3:]
    return dict(
        HEADS=heads, C=channels, LEVELS=levels, POINTS=points, QUERIES=16, num_warps=4,
        BLOCK_C=triton.next_power_of_2(channels), SUM=sum_type(value, locations, weights),
    )  # fmt: skip


def _wide(x: Tensor) -> Tensor:
    return x.to(sum_dtype(x))
