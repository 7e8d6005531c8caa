"""Feature enhancer of Grounding DINO 1.5 Edge (arXiv 2405.10300, section 2.1.2).

Image and text meet on P5 only: bi-directional cross-attention, text self-attention within each
phrase, vanilla self-attention over the P5 tokens. RT-DETR's cross-scale fusion then brings in P4
and P3. The paper gives no depths or widths; ours, in ``configs/common/models``, are chosen to land
on its parameter count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..moe.routing import Routing
from .attention import BiAttention, MultiHeadAttention, clone_layers, grid_encoding, sine_encoding
from .feed_forward import FeedForward
from .structures import ImageMemory, TextFeatures


class TextLayer(nn.Module):
    """Self-attention within each phrase, then an FFN; post-norm."""

    def __init__(self, dim: int, heads: int, ffn: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(dim, heads, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, ffn)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, text: TextFeatures) -> Tensor:
        tokens = text.tokens
        same_block = text.blocks[:, :, None] == text.blocks[:, None, :]
        # Grounding DINO takes whole numbers for parts of the circle.
        angles = block_positions(text.blocks)[..., None] * (2 * math.pi)
        position = sine_encoding(angles, tokens.shape[-1])
        q = tokens + position.to(tokens.dtype)
        tokens = self.norm1(tokens + self.self_attention(q, q, tokens, same_block))
        return self.ffn(tokens, norm=self.norm2)[0]


class ImageLayer(nn.Module):
    """Vanilla self-attention over the tokens of P5, then an FFN, dense or MoE; post-norm."""

    def __init__(self, dim: int, heads: int, ffn: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(dim, heads, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.ffn = ffn
        self.norm2 = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, position: Tensor, mask: Tensor, scene: Tensor
    ) -> tuple[Tensor, Routing | None]:
        q = x + position
        x = self.norm1(x + self.self_attention(q, q, x, mask[:, None]))
        return self.ffn(x, scene, self.norm2)


class EnhancerLayer(nn.Module):
    """Cross-modal fusion, then the text layer and the image layer; a closed-set detector has the
    image layer alone."""

    def __init__(
        self, fusion: BiAttention | None, text: TextLayer | None, image: nn.Module
    ) -> None:
        super().__init__()
        self.fusion, self.text, self.image = fusion, text, image

    def forward(
        self, x: Tensor, text: TextFeatures, position: Tensor, mask: Tensor, *geometry: object
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """One layer over image tokens and text.

        Args:
            x: [B, N, D], image tokens; position [1 or B, N, D] and mask bool [B, N] alike.
            text: prompts, of L tokens.
            geometry: further arguments of the image layer; see `DeformableImageLayer.forward`.

        Returns image tokens [B, N, D], text tokens [B, L, D], the Routing of the image layer's FFN
        (None where it is dense).
        """
        tokens = text.tokens
        if self.fusion is not None:
            x, tokens = self.fusion(x, tokens, mask, text.mask)
        if self.text is not None:
            tokens = self.text(text.replace_tokens(tokens))
        x, routing = self.image(x, position, mask, masked_mean(x, mask), *geometry)
        return x, tokens, routing


def run_layers(
    layers: Iterable[nn.Module],
    x: Tensor,
    text: TextFeatures,
    geometry: tuple,
    recompute: bool,
) -> tuple[Tensor, TextFeatures, list[Routing]]:
    """Cross-modal layers one after the other.

    Args:
        geometry: position encoding, mask, and further arguments of `EnhancerLayer.forward`.
        recompute: activations are computed once more in the backward pass instead of kept.
    """
    position, *rest = geometry
    arguments = (position.to(x.dtype), *rest)
    routings = []
    for layer in layers:
        if recompute:
            x, tokens, routing = checkpoint(layer, x, text, *arguments, use_reentrant=False)
        else:
            x, tokens, routing = layer(x, text, *arguments)
        text = text.replace_tokens(tokens)
        if routing is not None:
            routings.append(routing)
    return x, text, routings


class ConvNorm(nn.Sequential):
    """Convolution, batch norm and an optional activation."""

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
    ) -> None:
        super().__init__(
            nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(cout),
            nn.SiLU(inplace=True) if act else nn.Identity(),
        )


class RepBlock(nn.Module):
    """RepVGG block while training: 3x3 and 1x1 branches, summed, then SiLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv3 = ConvNorm(dim, dim, 3, act=False)
        self.conv1 = ConvNorm(dim, dim, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv3(x) + self.conv1(x))


class CSPRepLayer(nn.Module):
    """RT-DETR's fusion block: two 1x1 branches, one through `depth` RepVGG blocks, summed."""

    def __init__(self, dim: int, depth: int = 3) -> None:
        super().__init__()
        self.branch = ConvNorm(2 * dim, dim)
        self.shortcut = ConvNorm(2 * dim, dim)
        self.blocks = nn.Sequential(*(RepBlock(dim) for _ in range(depth)))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two maps [B, D, H, W] -> [B, D, H, W]"""
        x = torch.cat([a, b], 1)
        return self.blocks(self.branch(x)) + self.shortcut(x)


class SeparableFusion(nn.Module):
    """A fusion block for CPUs: the sum of both maps, a depthwise 3x3 and a 1x1 convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = ConvNorm(dim, dim, 3, groups=dim, act=False)
        self.pointwise = ConvNorm(dim, dim)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two maps [B, D, H, W] -> [B, D, H, W]"""
        x = a + b
        return x + self.pointwise(self.depthwise(x))


class CrossScaleFusion(nn.Module):
    """RT-DETR's CCFF: a top-down path, then (unless `bottom_up` is off) a bottom-up path.

    Args:
        block: fuses two maps [B, D, H, W] into one; it is copied.
    """

    def __init__(self, dim: int, block: nn.Module, levels: int = 3, bottom_up: bool = True) -> None:
        super().__init__()
        steps = levels - 1
        self.lateral = clone_layers(ConvNorm(dim, dim), steps)
        self.top_down = clone_layers(block, steps)
        self.downsample = clone_layers(ConvNorm(dim, dim, 3, 2), steps if bottom_up else 0)
        self.bottom_up = clone_layers(block, steps if bottom_up else 0)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps [B, D, H, W] from fine to coarse; returns as many of the same shapes."""
        maps = list(maps)
        for i, (lateral, block) in enumerate(zip(self.lateral, self.top_down, strict=True)):
            coarse = len(maps) - 1 - i
            maps[coarse] = lateral(maps[coarse])
            up = F.interpolate(maps[coarse], size=maps[coarse - 1].shape[-2:], mode="nearest")
            maps[coarse - 1] = block(up, maps[coarse - 1])
        for i, (down, block) in enumerate(zip(self.downsample, self.bottom_up, strict=True)):
            maps[i + 1] = block(down(maps[i]), maps[i + 1])
        return maps


class EdgeEnhancer(nn.Module):
    """P5-only fusion with text, then cross-scale fusion.

    Args:
        dim: width D.
        in_channels: channels of P3, P4, P5.
        layer: cross-modal layer on P5, copied `num_layers` times.
        cross_scale: brings P4 and P3 in.
    """

    def __init__(
        self,
        dim: int,
        in_channels: list[int],
        layer: EnhancerLayer,
        num_layers: int,
        cross_scale: CrossScaleFusion,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.input_proj = nn.ModuleList(ConvNorm(c, dim, act=False) for c in in_channels)
        self.layers = clone_layers(layer, num_layers)
        self.cross_scale = cross_scale
        self.grad_checkpointing = grad_checkpointing

    def forward(
        self, features: dict[str, Tensor], masks: dict[str, Tensor], text: TextFeatures
    ) -> tuple[ImageMemory, TextFeatures, list[Routing]]:
        """features {"p3", "p4", "p5"} of [B, C, H, W], masks alike of bool [B, H, W]."""
        names = sorted(features)
        maps = [proj(features[n]) for n, proj in zip(names, self.input_proj, strict=True)]
        top_mask = masks[names[-1]]
        position = grid_encoding(top_mask, maps[-1].shape[1])
        x, flat_mask = maps[-1].flatten(2).transpose(1, 2), top_mask.flatten(1)
        again = self.grad_checkpointing and self.training
        x, text, routings = run_layers(self.layers, x, text, (position, flat_mask), again)
        scene = masked_mean(x, flat_mask)
        maps[-1] = x.transpose(1, 2).reshape(maps[-1].shape)
        maps = self.cross_scale(maps)
        memory = ImageMemory(
            tokens=torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1),
            mask=torch.cat([masks[n].flatten(1) for n in names], 1),
            shapes=[tuple(m.shape[-2:]) for m in maps],
            valid_ratios=torch.stack([valid_ratio(masks[n]) for n in names], 1),
            scene=scene,
        )
        return memory, text, routings


def block_positions(blocks: Tensor) -> Tensor:
    """Position of each token within its block, which is one run of equal ids: [B, L] -> int64
    [B, L]. It counts the earlier tokens of the block, as ONNX has no cummax."""
    index = torch.arange(blocks.shape[1], device=blocks.device)
    earlier = (blocks[:, :, None] == blocks[:, None]) & (index[:, None] > index)
    return earlier.sum(2)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens: x [B, N, D], mask [B, N] -> [B, D]"""
    weight = mask.to(x.dtype)[..., None]
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


def valid_ratio(mask: Tensor) -> Tensor:
    """Share of the canvas that the content fills: [B, H, W] -> (width, height) [B, 2]"""
    height, width = mask[:, :, 0].sum(1) / mask.shape[1], mask[:, 0].sum(1) / mask.shape[2]
    return torch.stack([width, height], -1).float()
