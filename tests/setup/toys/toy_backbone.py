"""A backbone of one's own."""

import torch
from torch import Tensor, nn


class ToyBackbone(nn.Module):
    """Mean colours of squares of 8, 16 and 32 pixels, each through a linear layer."""

    strides = (8, 16, 32)
    frozen = pretrained = False

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Conv2d(3, c, 1) for c in channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.maps[0].weight.dtype

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images [B, 3, H, W], normalised -> {"p3", "p4", "p5"}: [B, C, H / s, W / s]"""
        pooled = [nn.functional.avg_pool2d(images, s) for s in self.strides]
        return {f"p{3 + i}": layer(pooled[i]) for i, layer in enumerate(self.maps)}
