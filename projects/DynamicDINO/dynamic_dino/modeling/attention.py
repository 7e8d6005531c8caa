"""Attention blocks and position encodings shared by the enhancer and the decoder.

Shapes: B images, N queries, M keys, D channels, h heads. Masks are boolean, True = may attend.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from dynamic_dino_kernels.deform_attn import ms_deform_attn
from timm.layers import DropPath
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q [B, h, N, d], k, v [B, h, M, d], mask [B|1, 1, N|1, M]."""
    if q.is_cpu and torch.is_grad_enabled():
        # The backward pass of torch's fused CPU attention is several times slower than this.
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, D] -> [B, h, N, D / h]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, h, N, d] -> [B, N, h * d]"""
    return x.transpose(1, 2).flatten(2)


class MultiHeadAttention(nn.Module):
    """Multi-head attention with separate projections of queries, keys and values."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q [B, N, D], k and v [B, M, D], mask [B|1, N|1, M] -> [B, N, D]"""
        q, k, v = (
            split_heads(proj(x), self.heads)
            for proj, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        out = attend(q, k, v, mask=None if mask is None else mask.unsqueeze(1))
        return self.dropout(self.out_proj(merge_heads(out)))


class BiAttention(nn.Module):
    """Image-to-text and text-to-image attention over one shared affinity matrix (GLIP, eq. 4-6).

    Both directions read the same q k^T, once along the text and once along the image, and are
    added to their inputs through a small learned scale, so that fusion starts as the identity.

    Args:
        add_to_normed: they are added to the layer-normalised inputs instead, as the code of
            Grounding DINO does.
    """

    def __init__(
        self,
        dim: int,
        embed_dim: int,
        heads: int,
        init_scale: float = 1e-4,
        drop_path: float = 0.1,
        add_to_normed: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.init_scale, self.add_to_normed = heads, init_scale, add_to_normed
        self.norm_image = nn.LayerNorm(dim)
        self.norm_text = nn.LayerNorm(dim)
        self.image_query = nn.Linear(dim, embed_dim)
        self.text_key = nn.Linear(dim, embed_dim)
        self.image_value = nn.Linear(dim, embed_dim)
        self.text_value = nn.Linear(dim, embed_dim)
        self.image_out = nn.Linear(embed_dim, dim)
        self.text_out = nn.Linear(embed_dim, dim)
        self.image_scale = nn.Parameter(torch.full((dim,), float(init_scale)))
        self.text_scale = nn.Parameter(torch.full((dim,), float(init_scale)))
        self.drop_path = DropPath(drop_path)

    def reset_parameters(self) -> None:
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.constant_(self.image_scale, self.init_scale)
        nn.init.constant_(self.text_scale, self.init_scale)

    def forward(
        self, image: Tensor, text: Tensor, image_mask: Tensor, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """image [B, N, D], text [B, L, D], masks [B, N] and [B, L] -> both updated

        As there are few tokens of text, the three projections of the image are applied to the other
        factor of its products: (x Q^T) k^T = x (k Q)^T, and so on. That saves N * D * embed_dim
        operations for each, and maps of width embed_dim.
        """
        x, t = self.norm_image(image), self.norm_text(text)
        key, value = (split_heads(proj(t), self.heads) for proj in (self.text_key, self.text_value))
        key = key * key.shape[-1] ** -0.5
        query = self.image_query.weight.unflatten(0, (self.heads, -1))  # [h, embed_dim / h, D]
        query_bias = self.image_query.bias.view(self.heads, -1, 1)
        scores = (key @ query).flatten(1, 2) @ x.transpose(1, 2)  # [B, h * L, N]
        scores = scores.unflatten(1, (self.heads, -1)) + key @ query_bias  # [B, h, L, N]

        out = self.image_out.weight.unflatten(1, (self.heads, -1)).transpose(0, 1)
        value = value @ out.transpose(1, 2) + self.image_out.bias / self.heads  # [B, h, L, D]
        shares = scores.masked_fill(~text_mask[:, None, :, None], float("-inf")).softmax(2)
        to_image = shares.flatten(1, 2).transpose(1, 2) @ value.flatten(1, 2)

        shares = scores.masked_fill(~image_mask[:, None, None], float("-inf")).softmax(3)
        seen = (shares.flatten(1, 2) @ x).unflatten(1, (self.heads, -1))  # [B, h, L, D]
        project = self.image_value.weight.unflatten(0, (self.heads, -1)).transpose(1, 2)
        to_text = merge_heads(seen @ project) + self.image_value.bias
        to_text = self.text_out(to_text)

        if self.add_to_normed:
            image, text = x, t
        image = image + self.drop_path(self.image_scale * to_image)
        text = text + self.drop_path(self.text_scale * to_text)
        return image, text


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, eq. 3) around reference boxes or points.

    Offsets are parts of a box's size, or, around a point, cells of each level.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        levels: int = 3,
        points: int = 4,
        value_dim: int | None = None,
    ) -> None:
        super().__init__()
        value_dim = value_dim or dim
        if value_dim % heads:
            raise ValueError(f"value_dim {value_dim} is not a multiple of heads {heads}")
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, value_dim)
        self.out_proj = nn.Linear(value_dim, dim)

    def reset_parameters(self) -> None:
        """Offsets start as a star: head h looks in direction h, point p at distance p + 1."""
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        star = torch.stack([angles.cos(), angles.sin()], -1)
        star = star / star.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, self.points + 1, dtype=torch.float32)
        star = star[:, None, None] * distance[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.weight.zero_()
            bias = star.expand(self.heads, self.levels, self.points, 2).reshape(-1)
            self.sampling_offsets.bias.copy_(bias)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.out_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        memory: Tensor,
        memory_mask: Tensor,
        shapes: list[tuple[int, int]],
        valid_ratios: Tensor,
    ) -> Tensor:
        """query [B, N, D], reference [B, N, 4] or [B, N, 2], memory [B, S, D], memory_mask [B, S],
        valid_ratios [B, levels, 2] (content width and height over the canvas's) -> [B, N, D]"""
        b, n, _ = query.shape
        value = self.value_proj(memory).masked_fill_(~memory_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.heads, -1))
        offsets = self.sampling_offsets(query).view(b, n, self.heads, self.levels, self.points, 2)
        weights = self.attention_weights(query).view(b, n, self.heads, -1).softmax(-1)
        weights = weights.view(b, n, self.heads, self.levels, self.points)
        # The reference is relative to the content, feature maps to the padded canvas.
        ratios = valid_ratios.repeat(1, 1, reference.shape[-1] // 2)
        scaled = (reference[:, :, None] * ratios[:, None])[:, :, None, :, None]
        if reference.shape[-1] == 4:
            centre, size = scaled.split(2, -1)  # [B, N, 1, levels, 1, 2]
            locations = torch.addcmul(centre, offsets, size, value=0.5 / self.points)
        else:
            cell = _widths_and_heights(shapes, valid_ratios)[:, None].reciprocal()
            locations = torch.addcmul(scaled, offsets, cell)
        return self.out_proj(ms_deform_attn(value, shapes, locations, weights))


def _widths_and_heights(shapes: list[tuple[int, int]], like: Tensor) -> Tensor:
    """[levels, 2]; filled on the device, as a CUDA graph can't record a copy from the host."""
    return torch.stack([like.new_full((), edge) for h, w in shapes for edge in (w, h)]).view(-1, 2)


def clone_layers(layer: nn.Module, n: int) -> nn.ModuleList:
    """n copies of a layer, each freshly initialised (children first, then their parents)."""
    layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(n))
    return layers.apply(_reset_parameters)


def _reset_parameters(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()


def sine_encoding(positions: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Sine-cosine encoding of coordinates: [..., C] -> [..., C * dim], coordinate after coordinate.

    Even channels hold sines, odd channels cosines, as in DETR. Always computed in fp32.
    """
    index = torch.arange(dim, dtype=torch.float32, device=positions.device)
    frequency = temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / dim)
    angles = positions.float()[..., None] / frequency
    pairs = torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1)
    return pairs.flatten(-3)


def box_encoding(boxes: Tensor, dim: int) -> Tensor:
    """Encodes boxes [..., 4] as [..., 4 * dim], in the order (y, x, w, h) of DAB-DETR."""
    x, y, w, h = boxes.unbind(-1)  # a list as an index would be copied from the host
    y_first = torch.stack([y, x, w, h], -1)
    return sine_encoding(y_first * (2 * math.pi), dim)


def grid_encoding(mask: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """DETR's position encoding of feature map cells, for a mask [B, H, W] of real cells.

    Positions are normalised by the content's size to (0, 2 pi]. Returns [B, H * W, dim].
    """
    y, x = mask.cumsum(1, dtype=torch.float32), mask.cumsum(2, dtype=torch.float32)
    y = y / (y[:, -1:] + 1e-6)
    x = x / (x[:, :, -1:] + 1e-6)
    yx = torch.stack([y, x], -1) * (2 * math.pi)
    return sine_encoding(yx, dim // 2, temperature).flatten(1, 2)


def grid_centres(shapes: list[tuple[int, int]], valid_ratios: Tensor) -> list[Tensor]:
    """Centres (x, y) of each level's cells as parts of the content: [B, h * w, 2] per level."""
    centres = []
    for (h, w), ratios in zip(shapes, valid_ratios.unbind(1), strict=True):
        y = torch.arange(h, device=ratios.device) + 0.5
        x = torch.arange(w, device=ratios.device) + 0.5
        centre = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], -1).view(1, h * w, 2)
        # Whole numbers of cells: what is usable must not depend on how padding rounds.
        cells = torch.stack([ratios[:, 0] * w, ratios[:, 1] * h], -1).round()
        centres.append(centre / cells[:, None])
    return centres
