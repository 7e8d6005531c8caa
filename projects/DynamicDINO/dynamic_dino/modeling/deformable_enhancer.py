"""Feature enhancer of Grounding DINO (arXiv 2303.05499, section 3.1): all levels meet the text.

Each layer fuses image and text in both directions, attends within each phrase, and attends to
sampled points of all levels (Deformable DETR).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..moe.routing import Routing
from .attention import DeformableAttention, clone_layers, grid_centres, grid_encoding
from .enhancer import EnhancerLayer, masked_mean, run_layers, valid_ratio
from .structures import ImageMemory, TextFeatures


class DeformableImageLayer(nn.Module):
    """Deformable self-attention over all levels, then an FFN, dense or MoE; post-norm.

    Args:
        ffn: `FeedForward` or `MoEFeedForward`; called as ffn(x, scene, norm).
    """

    def __init__(self, dim: int, self_attention: DeformableAttention, ffn: nn.Module) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.norm1 = nn.LayerNorm(dim)
        self.ffn = ffn
        self.norm2 = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        mask: Tensor,
        scene: Tensor,
        centres: Tensor,
        shapes: list[tuple[int, int]],
        valid_ratios: Tensor,
    ) -> tuple[Tensor, Routing | None]:
        """x, position [B, S, D], mask [B, S], scene [B, D], centres [B, S, 2] of the cells"""
        attended = self.self_attention(x + position, centres, x, mask, shapes, valid_ratios)
        return self.ffn(self.norm1(x + attended), scene, self.norm2)


class DeformableEnhancer(nn.Module):
    """Fusion, text and deformable layers over all levels of the maps.

    Args:
        dim: width D, of the maps too.
        levels: number of maps.
        layer: copied `num_layers` times; its image layer is a `DeformableImageLayer`.
        temperature: of the position encoding of cells.
    """

    def __init__(
        self,
        dim: int,
        levels: int,
        layer: EnhancerLayer,
        num_layers: int,
        temperature: float = 20.0,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.empty(levels, dim))
        nn.init.normal_(self.level_embed)
        self.layers = clone_layers(layer, num_layers)
        self.temperature = temperature
        self.grad_checkpointing = grad_checkpointing

    def forward(
        self, features: dict[str, Tensor], masks: dict[str, Tensor], text: TextFeatures
    ) -> tuple[ImageMemory, TextFeatures, list[Routing]]:
        """features {"p3", ..., "p6"} of [B, D, H, W], masks alike of bool [B, H, W]."""
        names = sorted(features)
        shapes = [(features[n].shape[-2], features[n].shape[-1]) for n in names]
        x = torch.cat([features[n].flatten(2).transpose(1, 2) for n in names], 1)
        mask = torch.cat([masks[n].flatten(1) for n in names], 1)
        valid_ratios = torch.stack([valid_ratio(masks[n]) for n in names], 1)
        position = torch.cat(
            [
                grid_encoding(masks[n], x.shape[-1], self.temperature) + embed
                for n, embed in zip(names, self.level_embed, strict=True)
            ],
            1,
        )
        centres = torch.cat(grid_centres(shapes, valid_ratios), 1)
        geometry = (position, mask, centres, shapes, valid_ratios)
        again = self.grad_checkpointing and self.training
        x, text, routings = run_layers(self.layers, x, text, geometry, again)
        top = shapes[-1][0] * shapes[-1][1]
        scene = masked_mean(x[:, -top:], mask[:, -top:])
        return ImageMemory(x, mask, shapes, valid_ratios, scene), text, routings
