"""`Denoising`: contrastive denoising queries (DINO, arXiv 2203.03605, section 3.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..structures import DenoisingQueries, Target, TextFeatures
from .boxes import cxcywh_to_xyxy, xyxy_to_cxcywh


class Denoising(nn.Module):
    """Shows the decoder noised ground truth, so that it learns to restore or to reject it.

    Each group holds every object of an image twice: a positive, whose box corners moved by less
    than `box_noise / 2` of the box's size and which must restore it; and a negative, whose corners
    moved by `box_noise / 2` to `box_noise` of it and which must be "no object". DINO's class
    embedding becomes, in an open vocabulary, a projection of the mean text feature of the phrase;
    for a few queries the phrase is another one of the same prompt. The decoder must not trust it.

    All randomness is drawn from torch's default generator.

    Args:
        embed_dim: width of the text features and of the queries.
        num_queries: denoising queries wanted per image; there are as many groups as fit, at least
            one.
        label_noise: half of it is the probability that a query shows another phrase.
        box_noise: see above; 1.0 in DINO.
    """

    min_size = 1e-3  # of a noised box, relative to the image

    def __init__(
        self,
        embed_dim: int = 256,
        num_queries: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.label_noise = label_noise
        self.box_noise = box_noise
        self.content: nn.Module = nn.Linear(embed_dim, embed_dim)

    def forward(
        self, targets: list[Target], text: TextFeatures, num_matching_queries: int
    ) -> DenoisingQueries:
        """M queries per image, group after group, N positives then N negatives in each.

        N is the largest number of objects in the batch; images with fewer have invalid slots of
        zero content. A batch without objects gives M = 0 queries that are still connected to the
        parameters, so that all ranks agree on the gradients they exchange.

        Args:
            targets: one per image.
            text: the prompts that the labels of the targets refer to.
            num_matching_queries: Q, which follow the M in the attention mask. Those never see
                denoising queries, which hold the answers; groups don't see each other.
        """
        device = text.tokens.device
        size = max(len(target.labels) for target in targets)
        groups = max(self.num_queries // (2 * size), 1) if size else 0
        boxes = pad_sequence([target.boxes.float() for target in targets], batch_first=True)
        labels = pad_sequence([target.labels for target in targets], batch_first=True)
        real = [torch.ones_like(target.labels, dtype=torch.bool) for target in targets]
        valid = pad_sequence(real, batch_first=True)

        index = torch.arange(size, device=device).repeat(2 * groups)  # the object of each slot
        negative = torch.arange(2 * groups, device=device).repeat_interleave(size) % 2 == 1
        valid = valid[:, index]
        target_index = index.expand_as(valid).masked_fill(negative | ~valid, -1)

        content = self._content(labels[:, index], text) * valid.unsqueeze(-1)
        noised = self._jitter(boxes[:, index], negative)
        # The box of an invalid slot is arbitrary, but must be one.
        noised = torch.where(valid.unsqueeze(-1), noised, 0.5)
        return DenoisingQueries(
            content=content,
            boxes=noised,
            attention_mask=_attention_mask(groups, 2 * size, num_matching_queries, device),
            target_index=target_index,
            valid=valid,
            groups=groups,
        )

    def _content(self, labels: Tensor, text: TextFeatures) -> Tensor:
        """labels int64 [B, M] -> [B, M, D], with some labels exchanged."""
        # A random step to the next phrases, which never leads back to the same one.
        others = ((text.phrase_map > 0).any(-1).sum(1, keepdim=True) - 1).clamp(min=0)
        step = 1 + (torch.rand(labels.shape, device=labels.device) * others).long()
        flip = torch.rand(labels.shape, device=labels.device) < self.label_noise / 2
        labels = torch.where(flip & (others > 0), (labels + step) % (others + 1), labels)

        phrases = self._phrases(text)
        return phrases.gather(1, labels.unsqueeze(-1).expand(-1, -1, phrases.shape[-1]))

    def _phrases(self, text: TextFeatures) -> Tensor:
        """Content of a query that shows a phrase: [B, P, D]"""
        return self.content(text.phrase_map.to(text.tokens.dtype) @ text.tokens)

    def _jitter(self, boxes: Tensor, negative: Tensor) -> Tensor:
        """Moves the corners of cxcywh boxes [B, M, 4]; `negative` bool [M] moves them farther."""
        half_size = boxes[..., 2:].repeat(1, 1, 2) / 2
        shift = torch.rand_like(boxes) + negative.unsqueeze(-1)
        sign = torch.randint_like(boxes, 2) * 2 - 1
        corners = cxcywh_to_xyxy(boxes) + self.box_noise * shift * sign * half_size
        noised = xyxy_to_cxcywh(corners.clamp(0, 1))
        # Corners that passed each other leave a box that is almost a point, as in DINO.
        return torch.cat([noised[..., :2], noised[..., 2:].clamp(min=self.min_size)], dim=-1)


class ClassDenoising(Denoising):
    """As in DINO itself: the content of a query is the embedding of a class, of which a
    `ClassVocabulary` has `num_classes`.

    DINO's "100 denoising queries" are 100 positives, and as many negatives.
    """

    def __init__(self, num_classes: int, embed_dim: int = 256, **options: Any) -> None:
        super().__init__(embed_dim, **options)
        self.content = nn.Embedding(num_classes, embed_dim)

    def _phrases(self, text: TextFeatures) -> Tensor:
        return self.content(text.phrase_map.argmax(-1))


def _attention_mask(
    groups: int, group_size: int, num_matching: int, device: torch.device
) -> Tensor:
    """bool [M + Q, M + Q], True where the query of the row must not see that of the column."""
    group = torch.arange(groups, device=device).repeat_interleave(group_size)
    noisy = len(group)
    mask = torch.zeros(noisy + num_matching, noisy + num_matching, dtype=torch.bool, device=device)
    mask[:noisy, :noisy] = group.unsqueeze(1) != group
    mask[noisy:, :noisy] = True
    return mask
