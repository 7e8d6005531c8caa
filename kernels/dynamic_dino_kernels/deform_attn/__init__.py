"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equation 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..moe.grouped import needs_grad
from . import gather, reference

__all__ = ["ms_deform_attn"]

# torch.export and what is made of it, such as ONNX, know grid_sample; older torch can't tell.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Weighted sum of bilinear samples from L feature maps, per query and head.

    Sampling and sum run in the widest dtype of the three tensors: locations in float32 keep their
    sub-pixel precision whatever autocast does to the values.

    Args:
        value: float [B, S, heads, head_dim], the flattened maps one after the other, row-major.
        spatial_shapes: (height, width) of each level; S is the sum of height * width. Python
            integers are best: a tensor [L, 2] on CUDA costs a synchronisation.
        sampling_locations: float [B, Q, heads, L, P, 2], (x, y) in units of the map: 0 and 1 are
            its outer edges. Outside there are zeros.
        attention_weights: float [B, Q, heads, L, P].
        backend: see `dynamic_dino_kernels.resolve_backend`; all but "triton" mean `grid_sample`,
            or, on a CPU where no gradient is asked for, a sum of gathered rows.

    Returns:
        [B, Q, heads * head_dim] in the dtype of value.

    Raises:
        ValueError: shapes that don't fit; the message names the argument.
    """
    if isinstance(spatial_shapes, Tensor):
        spatial_shapes = spatial_shapes.tolist()
    shapes = [(int(height), int(width)) for height, width in spatial_shapes]
    _check_arguments(value, shapes, sampling_locations, attention_weights)
    tensors = (value, sampling_locations, attention_weights)
    gathers = value.device.type == "cpu" and not needs_grad(*tensors) and not is_exporting()
    implementation = (gather if gathers else reference).ms_deform_attn
    if resolve_backend(backend, value.device) == "triton":
        from .ops import triton_ms_deform_attn as implementation  # imports Triton
    with torch.autocast(value.device.type, enabled=False):
        return implementation(value, shapes, *tensors[1:])


def _check_arguments(
    value: Tensor,
    shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> None:
    if value.dim() != 4:
        raise ValueError(
            f"value must be [B, S, heads, head_dim], but its shape is {tuple(value.shape)}"
        )
    batch, size, heads, _ = value.shape
    if sum(height * width for height, width in shapes) != size:
        raise ValueError(f"spatial_shapes {shapes} don't add up to the S={size} cells of value")
    if sampling_locations.dim() != 6:
        raise ValueError(
            "sampling_locations must be [B, Q, heads, L, P, 2], but its shape is "
            f"{tuple(sampling_locations.shape)}"
        )
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    weights_shape = (batch, queries, heads, len(shapes), points)
    expected = {
        "sampling_locations": (sampling_locations, (*weights_shape, 2)),
        "attention_weights": (attention_weights, weights_shape),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for value {tuple(value.shape)} and {len(shapes)} "
                f"levels, but its shape is {tuple(tensor.shape)}"
            )
