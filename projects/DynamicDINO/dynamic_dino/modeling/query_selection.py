"""Language-guided query selection (Grounding DINO, section 3.2; two-stage part of DINO)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import grid_centres
from .heads import BoxHead, ContrastiveHead, LinearHead
from .structures import ImageMemory, Predictions, Queries, TextFeatures


class QuerySelection(nn.Module):
    """Keeps the memory tokens that look most like any token of the text, and their boxes.

    The content of a query is learned and doesn't depend on the image (DINO's mixed query
    selection): only positions are selected.

    Args:
        rank_unusable: what to do with tokens of the image whose boxes `grid_boxes` calls unusable.
            False: they come last. True, as the code of Grounding DINO: they compete as zeros do,
            and their box is the corner (1, 1, 1, 1).
        rank_padding: tokens of the padding compete like that too, instead of coming last, as the
            code of Grounding DINO lets them: results then depend on the padding of the batch.
    """

    def __init__(
        self,
        dim: int,
        num_queries: int,
        class_head: ContrastiveHead | LinearHead,
        base_size: float = 0.05,
        rank_unusable: bool = False,
        rank_padding: bool = False,
    ) -> None:
        super().__init__()
        self.num_queries, self.base_size = num_queries, base_size
        self.rank_unusable, self.rank_padding = rank_unusable, rank_padding
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.class_head = class_head
        self.box_head = BoxHead(dim)
        self.content = nn.Embedding(num_queries, dim)

    def forward(self, memory: ImageMemory, text: TextFeatures) -> tuple[Queries, Predictions]:
        boxes, usable = grid_boxes(memory, self.base_size)
        tokens, ranked = memory.tokens, usable
        if self.rank_unusable:
            tokens, ranked = tokens.masked_fill(~usable[..., None], 0.0), memory.mask
        tokens = self.norm(self.proj(tokens))
        logits = self.class_head(tokens, text.tokens, text.mask)
        score = logits.amax(-1)
        if not self.rank_padding:
            score = score.masked_fill(~ranked, float("-inf"))
        k = min(self.num_queries, score.shape[1])
        top = score.topk(k, dim=1).indices
        tokens, logits, boxes = (gather_rows(t, top) for t in (tokens, logits, boxes))
        boxes = self.box_head(tokens, boxes)
        if self.rank_unusable:
            boxes = boxes.masked_fill(~gather_rows(usable[..., None], top), 1.0)
        content = self.content.weight[:k].expand(boxes.shape[0], -1, -1)
        return Queries(content, boxes.detach()), Predictions(logits, boxes)


def grid_boxes(memory: ImageMemory, base_size: float) -> tuple[Tensor, Tensor]:
    """One square-ish box per memory token: centre on its cell, size 0.05 * 2^level of the content.

    Returns boxes [B, S, 4] and which tokens are usable [B, S]: inside the content, and not so
    near its border that the box's logit would explode.
    """
    boxes = [
        torch.cat([centre, torch.full_like(centre, base_size * 2**level)], -1)
        for level, centre in enumerate(grid_centres(memory.shapes, memory.valid_ratios))
    ]
    result = torch.cat(boxes, 1)
    usable = ((result > 0.01) & (result < 0.99)).all(-1) & memory.mask
    return result.clamp(0.01, 0.99), usable


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, S, C], index [B, Q] -> [B, Q, C]"""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
