"""`Criterion`: the training losses of the detector."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from ...moe.losses import RouterLoss
from ..structures import DenoisingQueries, DetectorOutput, Predictions, Target
from .boxes import cxcywh_to_xyxy, generalized_box_iou
from .matcher import Assignment


class Criterion(nn.Module):
    """Focal classification over text tokens, L1 and GIoU, on every layer; and router losses.

    Every decoder layer and the query selection are matched to the objects on their own (auxiliary
    losses, DETR); denoising queries know their object (DINO). All sums are divided by the number of
    objects, see `mean_objects`. Computed in float32 whatever autocast says.

    Args:
        matcher: see `HungarianMatcher`.
        weight_class, weight_bbox, weight_giou: loss weights; Grounding DINO trains with 2, 5, 2.
        focal_alpha, focal_gamma: of the focal loss (arXiv 1708.02002, equation 5).
        router_losses: see `RouterLoss`.
    """

    def __init__(
        self,
        matcher: nn.Module,
        weight_class: float = 2.0,
        weight_bbox: float = 5.0,
        weight_giou: float = 2.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        router_losses: Sequence[RouterLoss] = (),
    ) -> None:
        super().__init__()
        self.matcher = matcher
        self.weight_class = weight_class
        self.weight_bbox = weight_bbox
        self.weight_giou = weight_giou
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.router_losses = tuple(router_losses)

    def forward(
        self, output: DetectorOutput, targets: list[Target], objects: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns the weighted losses, scalars in float32 whose sum is to be minimised.

        Args:
            objects: what sums are divided by instead of `mean_objects` of this batch, where it is
                one of several whose gradients are accumulated.

        Names: `loss_class`, `loss_bbox`, `loss_giou` for the last decoder layer; the same with
        `_0`, `_1`, ... for the earlier ones, `_selection` for the query selection, `_dn`, `_dn_0`,
        ... for denoising; and the router losses by their own names. The set of names does not
        depend on the targets, nor does the set of parameters that get a gradient.
        """
        batch = output.layers[-1].boxes.shape[0]
        if len(targets) != batch:
            raise ValueError(f"targets are {len(targets)}, but the batch has {batch} images")

        device = output.layers[-1].boxes.device
        with torch.autocast(device.type, enabled=False):
            if objects is None:
                objects = mean_objects([sum(len(t.labels) for t in targets)], device)
            wanted = _Objects(targets, output)
            mask = output.text.mask.unsqueeze(1)

            layers = _stack([*output.layers, output.selection])
            suffixes = [*_suffixes(output.layers, ""), "_selection"]
            assignment = self.matcher(layers, targets, output.text)
            losses = self._losses(layers, suffixes, assignment, wanted, mask, objects)

            if output.denoising is not None:
                layers = _stack(output.denoising_layers)
                suffixes = _suffixes(output.denoising_layers, "_dn")
                assignment = _known_assignment(output.denoising, targets, len(suffixes))
                mask = mask & output.denoising.valid.unsqueeze(2)
                count = objects * max(output.denoising.groups, 1)
                losses |= self._losses(layers, suffixes, assignment, wanted, mask, count)

            if output.routings:
                for router_loss in self.router_losses:
                    losses[router_loss.name] = router_loss(output.routings)
        return losses

    def _losses(
        self,
        layers: Predictions,
        suffixes: list[str],
        assignment: Assignment,
        objects: _Objects,
        mask: Tensor,
        count: Tensor,
    ) -> dict[str, Tensor]:
        """The three losses of each of S stacked layers. `mask` bool [B, 1 or Q, L]: what counts."""
        layer = torch.arange(len(suffixes), device=mask.device).unsqueeze(1)
        matched = (layer, assignment.image, assignment.query)

        # Padding tokens may have logits of -inf: they must leave before the loss, not after it,
        # or their gradient is 0 * inf.
        logits = layers.logits.masked_fill(~mask, 0)
        wanted = torch.zeros_like(logits)
        wanted[matched] = objects.tokens[assignment.target]
        focal = sigmoid_focal_loss(logits, wanted, self.focal_alpha, self.focal_gamma)
        loss_class = (focal * mask).sum((1, 2, 3)) / count

        boxes = layers.boxes[matched]
        true_boxes = objects.boxes[assignment.target]
        loss_bbox = (boxes - true_boxes).abs().sum((1, 2)) / count
        giou = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(true_boxes))
        loss_giou = (1 - giou).sum(1) / count

        losses = {
            "loss_class": self.weight_class * loss_class,
            "loss_bbox": self.weight_bbox * loss_bbox,
            "loss_giou": self.weight_giou * loss_giou,
        }
        return {
            name + suffix: value
            for name, values in losses.items()
            for suffix, value in zip(suffixes, values.unbind(), strict=True)
        }


class _Objects:
    """All N objects of the batch: boxes [N, 4], wanted tokens [N, L]."""

    def __init__(self, targets: list[Target], output: DetectorOutput) -> None:
        phrase_map = output.text.phrase_map
        self.boxes = torch.cat([target.boxes for target in targets]).float()
        self.tokens = torch.cat(
            [(phrase_map[image] > 0)[target.labels] for image, target in enumerate(targets)]
        ).float()


def _stack(layers: list[Predictions]) -> Predictions:
    """S layers as one, in float32: one pass over all of them costs a few large operations."""
    return Predictions(
        torch.stack([layer.logits.float() for layer in layers]),
        torch.stack([layer.boxes.float() for layer in layers]),
    )


def _suffixes(layers: list[Predictions], suffix: str) -> list[str]:
    """Earlier layers have their number after the suffix, the last one has it plain."""
    return [*(f"{suffix}_{i}" for i in range(len(layers) - 1)), suffix]


def _known_assignment(
    denoising: DenoisingQueries, targets: list[Target], layers: int
) -> Assignment:
    """The positives, image after image: every object once in each group. So the host knows how many
    there are, and needn't wait for the device to find them, as `nonzero` would."""
    counts, index = [len(target.labels) for target in targets], denoising.target_index
    offsets = torch.stack([index.new_full((), n) for n in accumulate([0, *counts[:-1]])])
    positive = denoising.valid & (index >= 0)
    found = positive.flatten().byte().argsort(descending=True, stable=True)
    found = found[: denoising.groups * sum(counts)]
    width = max(index.shape[1], 1)
    image, query = found // width, found % width
    target = offsets[image] + index[image, query]
    return Assignment(*(index.expand(layers, -1) for index in (image, query, target)))


def mean_objects(counts: Sequence[int], device: torch.device) -> Tensor:
    """The objects of a batch, float32 scalar: their number in all batches of all processes, at
    least 1, over the number of batches. So a mean of gradients over batches and processes doesn't
    depend on how many there are. Collective.

    Args:
        counts: of the batches of this process, as many as of every other.
    """
    total = torch.full((), float(sum(counts)), device=device)
    batches = len(counts)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
        batches *= dist.get_world_size()
    return total.clamp(min=1) / batches
