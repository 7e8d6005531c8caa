"""Grounding DINO's projections of the backbone's maps to one width, and a coarser map (DETR's)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class GroupNormNeck(nn.Module):
    """A convolution and a group norm for each map: 1x1, then 3x3 of stride 2 for coarser maps.

    Group norm counts the padding of a map in; see ``pad_images`` of the detector.

    Args:
        in_channels: of the backbone's maps, from fine to coarse.
        dim: width of the maps that come out.
        levels: number of those; what the backbone lacks is made from its last map.
    """

    def __init__(
        self, in_channels: Sequence[int], dim: int, levels: int = 4, groups: int = 32
    ) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(c, dim, 1) for c in in_channels]
        for i in range(levels - len(in_channels)):
            convolutions.append(nn.Conv2d(dim if i else in_channels[-1], dim, 3, 2, 1))
        self.layers = nn.ModuleList(
            nn.Sequential(c, nn.GroupNorm(groups, dim)) for c in convolutions
        )
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"p3", "p4", "p5"} of [B, C, H, W] -> {"p3", ..., "p6"} of [B, dim, H, W]"""
        names = sorted(features)
        maps = {n: layer(features[n]) for n, layer in zip(names, self.layers, strict=False)}
        x, top = features[names[-1]], int(names[-1][1:])
        for i, layer in enumerate(self.layers[len(names) :], 1):
            x = maps[f"p{top + i}"] = layer(x)
        return maps
