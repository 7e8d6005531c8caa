"""Multi-scale deformable attention as a weighted sum of rows: for CPUs, without gradients.

A bilinear sample is a sum over four cells, so each (query, head) is one bag of 4 * L * P rows of
`value`, read as they lie: a third of the time that `grid_sample` takes, which wants every head as
an image of its own. The backward pass of a bag is no faster, so training keeps `grid_sample`.
"""

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
    batch, cells, heads, head_dim = value.shape
    queries, levels, points = sampling_locations.shape[1], len(shapes), sampling_locations.shape[4]
    dtype = torch.promote_types(
        torch.promote_types(value.dtype, sampling_locations.dtype), attention_weights.dtype
    )

    # One axis for the L * P points of a bag, x and y apart: [2, B, Q, heads, L * P].
    size = torch.tensor([(width, height) for height, width in shapes], dtype=dtype)
    size = size.t().repeat_interleave(points, 1)[:, None, None, None]
    locations = sampling_locations.to(dtype).flatten(3, 4).movedim(-1, 0)
    # From one cell outside the map on there are zeros only; so no index overflows.
    position = (locations * size - 0.5).nan_to_num(-1).clamp(min=-1).minimum(size)
    near = position.floor()
    share = position - near
    far = (near + 1).clamp(min=0).minimum(size - 1)
    # What a map lacks gets no weight: the near cell of both borders, the far one of the last.
    share_near = (1 - share) * ((near >= 0) & (near < size))
    share_far = share * (near < size - 1)
    near = near.clamp(min=0).minimum(size - 1)

    starts = torch.tensor([0] + [height * width for height, width in shapes[:-1]]).cumsum(0)
    row = torch.arange(batch)[:, None, None, None] * cells + starts.repeat_interleave(points)
    head = torch.arange(heads)[:, None]
    corners, weights = [], []
    attention = attention_weights.to(dtype).flatten(3)
    for y, share_y in ((near[1], share_near[1]), (far[1], share_far[1])):
        line = (y * size[0]).long() + row
        share_y = share_y * attention
        for x, share_x in ((near[0], share_near[0]), (far[0], share_far[0])):
            corners.append((line + x.long()) * heads + head)
            weights.append(share_x * share_y)
    bags = (batch * queries * heads, 4 * levels * points)
    out = F.embedding_bag(
        torch.cat(corners, -1).view(bags),
        value.to(dtype).reshape(-1, head_dim),
        mode="sum",
        per_sample_weights=torch.cat(weights, -1).view(bags),
    )
    return out.view(batch, queries, heads * head_dim).to(value.dtype)
