"""Multi-scale deformable attention on `torch.nn.functional.grid_sample`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn(
    value: Tensor,
    shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """See `dynamic_dino_kernels.deform_attn.ms_deform_attn`, which has checked the arguments."""
    batch, _, heads, head_dim = value.shape
    queries = sampling_locations.shape[1]
    dtype = torch.promote_types(
        torch.promote_types(value.dtype, sampling_locations.dtype), attention_weights.dtype
    )

    # grid_sample treats images one by one, so each (image, head) becomes one "image".
    grids = (2 * sampling_locations.to(dtype) - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)
    samples = []
    levels = value.split([height * width for height, width in shapes], dim=1)
    for (height, width), level, grid in zip(shapes, levels, grids, strict=True):
        image = level.to(dtype).permute(0, 2, 3, 1).reshape(-1, head_dim, height, width)
        samples.append(F.grid_sample(image, grid, padding_mode="zeros", align_corners=False))
    sampled = torch.cat(samples, dim=-1)  # [B * heads, head_dim, Q, L * P]

    weights = attention_weights.to(dtype).permute(0, 2, 1, 3, 4).flatten(3).flatten(0, 1)
    out = (sampled * weights.unsqueeze(1)).sum(-1)  # [B * heads, head_dim, Q]
    out = out.view(batch, heads * head_dim, queries).transpose(1, 2)
    return out.to(value.dtype).contiguous()
