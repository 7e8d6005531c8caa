"""Multi-scale deformable attention as a weighted sum of rows: for CPUs, without gradients.

A bilinear sample is a sum over four cells, so each (query, head) is one bag of 4 * L * P rows of
`value`, read as they lie: a fifth of the time that `grid_sample` takes, which wants every head as
an image of its own. The backward pass of a bag is no faster, so training keeps `grid_sample`.

Indices and weights of the cells are made for some queries at a time, so that they stay in the
cache: on a map of 800 x 1333 pixels, a layer of Grounding DINO's enhancer has 2.8 million samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2**18  # samples that are looked at together


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
    maps = Maps(shapes, points, heads, dtype)
    rows = value.to(dtype).reshape(batch, cells * heads, head_dim)
    out = rows.new_empty(batch, queries, heads * head_dim)
    block = max(1, BLOCK // (heads * levels * points))
    for i in range(batch):
        for start in range(0, queries, block):
            part = slice(start, start + block)
            cell, weight = maps.bags(
                sampling_locations[i, part].to(dtype).flatten(2, 3).movedim(-1, 0).contiguous(),
                attention_weights[i, part].to(dtype).flatten(2),
            )
            bags = F.embedding_bag(cell, rows[i], mode="sum", per_sample_weights=weight)
            out[i, part] = bags.view(-1, heads * head_dim)
    return out.to(value.dtype)


class Maps:
    """Where the cells of the maps are among the rows of `value`, for each of L * P points."""

    def __init__(
        self, shapes: list[tuple[int, int]], points: int, heads: int, dtype: torch.dtype
    ) -> None:
        def per_point(levels: list[list[int]], dtype: torch.dtype) -> Tensor:
            """x and y of each level -> [2, 1, 1, L * P]"""
            return torch.tensor(levels, dtype=dtype).t().repeat_interleave(points, 1)[:, None, None]

        sizes = [[width, height] for height, width in shapes]
        starts = torch.tensor([0] + [h * w for h, w in shapes[:-1]], dtype=torch.int32).cumsum(0)
        self.size = per_point(sizes, dtype)
        self.last_near = (self.size - 2).clamp(min=0)
        self.has_far = (self.size > 1).to(dtype)
        self.stride = per_point([[1, width] for _, width in shapes], torch.int32) * heads
        self.far = self.stride * (self.size > 1)
        self.start = starts.int().repeat_interleave(points) * heads
        self.start = self.start + torch.arange(heads, dtype=torch.int32)[:, None]

    def bags(self, locations: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """locations [2, Q, heads, L * P], attention [Q, heads, L * P] -> the four cells of each
        sample and their weights, int32 and float [Q * heads, 4 * L * P]"""
        position = (locations * self.size).sub_(0.5).nan_to_num_(-1.0)
        # A cell's share falls from 1 at its centre to 0 at the next one's, whichever two they are:
        # beyond the border, a sample gives the two cells before it what is left of it, or nothing.
        near = position.floor().clamp_(min=0).minimum(self.last_near)
        distance = position.sub_(near)
        share_far = torch.sub(self.has_far, (distance - 1).abs_()).clamp_(min=0)
        share_near = distance.abs_().neg_().add_(1).clamp_(min=0)
        column, row = near.int().mul_(self.stride)
        first = column.add_(row).add_(self.start)
        line = torch.stack([first, first + self.far[0]], 2)
        cells = torch.cat([line, line + self.far[1, :, None]], 2)
        x = torch.stack([share_near[0], share_far[0]], 2)
        y = torch.stack([share_near[1], share_far[1]], 2).mul_(attention[:, :, None])
        weights = (y[:, :, :, None] * x[:, :, None]).flatten(2, 3)
        return cells.flatten(2).flatten(0, 1), weights.flatten(2).flatten(0, 1)
