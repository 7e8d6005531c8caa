"""`ProposalStatistics`: what the selected boxes say about a scene, for HI-MoE's scene router."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .structures import Predictions

THRESHOLDS = (0.1, 0.3, 0.5)  # of scores
SIDES = (0.05, 0.15, 0.4)  # of boxes, as parts of the image's: sqrt(width * height)
STATISTICS = (
    "mean score",
    "best score",
    *(f"share of scores above {t}" for t in THRESHOLDS),
    "number of objects",  # the sum of the scores, log(1 + x), 1 for all K proposals
    *(f"share of sides below {s}" for s in SIDES),
    f"share of sides from {SIDES[-1]}",
    "spread in x",
    "spread in y",
)


class ProposalStatistics(nn.Module):
    """Appends a few numbers about the proposals to the scene's features.

    HI-MoE's global descriptor "may optionally be augmented with coarse proposal statistics from a
    lightweight auxiliary head" (arXiv 2604.04908, section 3.3.1). Which statistics, and which head,
    the paper doesn't say: here they are `STATISTICS` of the K boxes that query selection chose and
    of their best class. Each lies in [0, 1]; shares of sides and the spread (standard deviation of
    the centres) weigh boxes by score, so that background hardly counts. The scene router can't
    change the proposals: they get no gradient from it.
    """

    def forward(self, scene: Tensor, proposals: Predictions) -> Tensor:
        """scene [B, D], logits [B, K, L] and boxes [B, K, 4] -> [B, D + len(STATISTICS)]"""
        scores = proposals.logits.detach().float().sigmoid().amax(-1)
        boxes = proposals.boxes.detach().float()
        weights = scores / scores.sum(1, keepdim=True).clamp(min=1e-6)

        def mean(values: Tensor) -> Tensor:  # [B, K, N] -> [B, N]
            return (weights[..., None] * values).sum(1)

        # One threshold after the other: as a tensor, they would be copied from the host.
        above = torch.stack([scores > threshold for threshold in THRESHOLDS], -1)
        most = math.log1p(scores.shape[1])
        sides = boxes[..., 2:].prod(-1).sqrt()
        size = torch.stack([sides >= side for side in SIDES], -1).sum(-1)
        centres = boxes[..., :2]
        spread = mean((centres - mean(centres)[:, None]) ** 2).sqrt()
        columns = [
            scores.mean(1, keepdim=True),
            scores.amax(1, keepdim=True),
            above.float().mean(1),
            torch.log1p(scores.sum(1, keepdim=True)) / most,
            mean(nn.functional.one_hot(size, len(SIDES) + 1).float()),
            spread,
        ]
        return torch.cat([scene, torch.cat(columns, 1).to(scene.dtype)], 1)
