"""Language-guided query selection (Grounding DINO, section 3.2; two-stage part of DINO)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .enhancer import ImageMemory
from .heads import BoxHead, ContrastiveHead
from .structures import Predictions, TextFeatures


@dataclass
class Queries:
    """content [B, Q, D] and reference boxes [B, Q, 4], detached, that the decoder starts from"""

    content: Tensor
    boxes: Tensor


class QuerySelection(nn.Module):
    """Keeps the memory tokens that look most like any token of the text, and their boxes.

    The content of a query is learned and doesn't depend on the image (DINO's mixed query
    selection): only positions are selected.
    """

    def __init__(
        self, dim: int, num_queries: int, class_head: ContrastiveHead, base_size: float = 0.05
    ) -> None:
        super().__init__()
        self.num_queries, self.base_size = num_queries, base_size
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.class_head = class_head
        self.box_head = BoxHead(dim)
        self.content = nn.Embedding(num_queries, dim)

    def forward(self, memory: ImageMemory, text: TextFeatures) -> tuple[Queries, Predictions]:
        boxes, usable = grid_boxes(memory, self.base_size)
        tokens = self.norm(self.proj(memory.tokens))
        logits = self.class_head(tokens, text.tokens, text.mask)
        score = logits.amax(-1).masked_fill(~usable, float("-inf"))
        k = min(self.num_queries, score.shape[1])
        top = score.topk(k, dim=1).indices
        tokens, logits, boxes = (gather_rows(t, top) for t in (tokens, logits, boxes))
        boxes = self.box_head(tokens, boxes)
        content = self.content.weight[:k].expand(len(boxes), -1, -1)
        return Queries(content, boxes.detach()), Predictions(logits, boxes)


def grid_boxes(memory: ImageMemory, base_size: float) -> tuple[Tensor, Tensor]:
    """One square-ish box per memory token: centre on its cell, size 0.05 * 2^level of the content.

    Returns boxes [B, S, 4] and which tokens are usable [B, S]: inside the content, and not so
    near its border that the box's logit would explode.
    """
    device = memory.tokens.device
    boxes = []
    for level, (h, w) in enumerate(memory.shapes):
        y = (torch.arange(h, device=device) + 0.5) / h
        x = (torch.arange(w, device=device) + 0.5) / w
        centre = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], -1).view(1, h * w, 2)
        centre = centre / memory.valid_ratios[:, level, None]
        boxes.append(torch.cat([centre, torch.full_like(centre, base_size * 2**level)], -1))
    result = torch.cat(boxes, 1)
    usable = ((result > 0.01) & (result < 0.99)).all(-1) & memory.mask
    return result.clamp(0.01, 0.99), usable


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, S, C], index [B, Q] -> [B, Q, C]"""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
