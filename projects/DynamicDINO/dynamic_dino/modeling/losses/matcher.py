"""`HungarianMatcher`: which query answers for which object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..structures import Predictions, Target, TextFeatures
from .boxes import cxcywh_to_xyxy, generalized_box_iou


@dataclass
class Assignment:
    """M pairs of a query and an object for each of S stacked layers, int64 [S, M] each.

    image   index of the image in the batch
    query   index of the query in its image
    target  index of the object in the concatenation of all images' targets
    """

    image: Tensor
    query: Tensor
    target: Tensor


class HungarianMatcher(nn.Module):
    """One-to-one assignment of least total cost (DETR), with Grounding DINO's class cost.

    cost = cost_class * C + cost_bbox * |box - target|_1 - cost_giou * GIoU, where C is the focal
    loss of calling a token positive minus that of calling it negative, averaged over the tokens of
    the object's phrase.

    Args:
        cost_class, cost_bbox, cost_giou: the weights.
        focal_alpha, focal_gamma: of the focal loss in C.
    """

    def __init__(
        self,
        cost_class: float = 2.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
    ) -> None:
        super().__init__()
        if cost_class == cost_bbox == cost_giou == 0:
            raise ValueError("cost_class, cost_bbox and cost_giou are all 0: nothing to match by")
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma

    @torch.no_grad()
    def forward(
        self, predictions: Predictions, targets: Sequence[Target], text: TextFeatures
    ) -> Assignment:
        """Matches each of S layers on its own; all costs travel to the host in one copy.

        Args:
            predictions: of S layers, stacked: logits [S, B, Q, L], boxes [S, B, Q, 4].
            targets: one per image, possibly empty.
            text: gives the tokens of each phrase.

        Returns:
            The pairs; an image has min(Q, N) of them, ordered by query.

        Raises:
            FloatingPointError: a cost is not finite, since the predictions are not.
        """
        layers, device = predictions.logits.shape[0], predictions.logits.device
        counts = [len(target.labels) for target in targets]
        if sum(counts) == 0:
            return Assignment(*torch.empty(3, layers, 0, dtype=torch.int64, device=device))

        boxes = pad_sequence([target.boxes.float() for target in targets], batch_first=True)
        labels = pad_sequence([target.labels for target in targets], batch_first=True)
        phrases = text.phrase_map.float()
        phrases = phrases / phrases.sum(-1, keepdim=True).clamp(min=1e-6)
        tokens = phrases.gather(1, labels.unsqueeze(-1).expand(-1, -1, phrases.shape[-1]))

        costs = self._cost(predictions, boxes, tokens).cpu().numpy()
        pairs = [self._assign(cost, counts, layer) for layer, cost in enumerate(costs)]
        return Assignment(*torch.from_numpy(np.stack(pairs, axis=1)).to(device))

    def _cost(self, predictions: Predictions, boxes: Tensor, tokens: Tensor) -> Tensor:
        """[S, B, Q, N] from target boxes [B, N, 4] and their phrases' token weights [B, N, L]."""
        with torch.autocast(boxes.device.type, enabled=False):
            # The small constant keeps the cost of padding tokens, whose logits are -inf, finite.
            prob = predictions.logits.float().sigmoid()
            positive = self.focal_alpha * (1 - prob) ** self.focal_gamma * -(prob + 1e-8).log()
            negative = (1 - self.focal_alpha) * prob**self.focal_gamma * -(1 - prob + 1e-8).log()
            class_cost = (positive - negative) @ tokens.transpose(1, 2)

            predicted = predictions.boxes.float().unsqueeze(-2)
            wanted = boxes.unsqueeze(1)
            bbox_cost = (predicted - wanted).abs().sum(-1)
            giou = generalized_box_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
            return self.cost_class * class_cost + self.cost_bbox * bbox_cost - self.cost_giou * giou

    @staticmethod
    def _assign(cost: np.ndarray, counts: list[int], layer: int) -> np.ndarray:
        """int64 [3, M]: image, query and target of each pair."""
        pairs, offset = [], 0
        for image, count in enumerate(counts):
            image_cost = cost[image, :, :count]
            if not np.isfinite(image_cost).all():
                raise FloatingPointError(
                    f"the matching cost of image {image} of the batch is not finite in layer "
                    f"{layer}: the predictions or the target boxes contain NaN or infinity "
                    "(did training diverge? lower the learning rate or clip gradients)"
                )
            query, target = linear_sum_assignment(image_cost)
            pairs.append(np.stack([np.full_like(query, image), query, target + offset]))
            offset += count
        return np.concatenate(pairs, axis=1, dtype=np.int64)
