"""Before the network: images on a common canvas, masks of their content, cached features, targets.

B images of sizes (height, width) in pixels. The canvas is the padded size of a batch; images lie at
its top left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .losses.boxes import xyxy_to_cxcywh
from .structures import Target

Size = tuple[int, int]


def canvas_size(sizes: Sequence[Size], canvas: int | None, divisor: int) -> Size:
    """(height, width) that a batch is padded to: multiples of `divisor`.

    Args:
        canvas: side of a square that every image must fit; None: the batch's largest sides.

    Raises:
        ValueError: an image is larger than the square.
    """
    height, width = (max(s[i] for s in sizes) for i in (0, 1))
    if canvas:
        if max(height, width) > canvas:
            raise ValueError(
                f"an image of {height} x {width} pixels doesn't fit the canvas of "
                f"{canvas}; resize it, or raise model.canvas"
            )
        height = width = canvas
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def padded_images(images: Sequence[Tensor], canvas: Size, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 images [3, h, w] -> float32 [B, 3, H, W] on the canvas, normalised, zero outside.

    mean, std: [3, 1, 1], of the pixel values; their device is that of the result.
    """
    height, width = canvas
    normed = [(i.to(mean.device) - mean) / std for i in images]
    padded = [F.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in normed]
    return torch.stack(padded)


def cached_features(
    batch: Sequence[Mapping], canvas: Size, strides: Sequence[int], device: torch.device
) -> dict[str, Tensor]:
    """The "features" of the samples as float32 {name: [B, C, H, W]}; strides from fine to coarse.

    Raises ValueError where they were cached for another canvas.
    """
    features = {
        name: torch.stack([s["features"][name].float() for s in batch]).to(device)
        for name in batch[0]["features"]
    }
    height, width = canvas
    for (name, x), stride in zip(sorted(features.items()), strides, strict=True):
        if x.shape[-2:] != (height // stride, width // stride):
            raise ValueError(
                f"cached features {name} are {x.shape[-2]} x {x.shape[-1]}, those of a "
                f"canvas of {height} x {width} pixels {height // stride} x "
                f"{width // stride}: make the cache for this model.canvas"
            )
    return features


def targets_of(batch: Sequence[Mapping], device: torch.device) -> list[Target]:
    """The "instances" of the samples, boxes relative to the content of their images."""
    result = []
    for sample in batch:
        h, w = sample["image_size"]
        boxes = sample["instances"].gt_boxes.tensor / torch.tensor([w, h, w, h])
        labels = sample["instances"].gt_classes
        result.append(Target(xyxy_to_cxcywh(boxes).to(device), labels.to(device)))
    return result


def distinct_images(batch: Sequence[dict]) -> tuple[list[dict], list[int]]:
    """The samples with an image that none before them has, and which of these has the image of each
    sample of the batch: the same tensor, as `TestMapper` gives it to the expressions of a photo."""
    place: dict[int, int] = {}
    shown: list[dict] = []
    rows: list[int] = []
    for sample in batch:
        row = place.setdefault(id(sample.get("image", sample)), len(shown))
        if row == len(shown):
            shown.append(sample)
        rows.append(row)
    return shown, rows


def rows_by_size(sizes: Sequence[Size]) -> list[list[int]]:
    """The rows of a batch, grouped by the size of their images."""
    groups: dict[Size, list[int]] = {}
    for row, size in enumerate(sizes):
        groups.setdefault(size, []).append(row)
    return list(groups.values())


def select_rows(maps: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """Maps {name: [B, ...]} -> {name: [len(rows), ...]}; rows may repeat. Stacked, since an index
    would be copied from the host to the device."""
    return {name: torch.stack([x[i] for i in rows]) for name, x in maps.items()}


def merge_maps(groups: list[list[int]], maps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Maps {name: [b, ..., h, w]} of groups of rows -> those of the batch {name: [B, ..., H, W]},
    padded with zeros (False) at the right and at the bottom to the largest."""
    result = {}
    for name in maps[0]:
        by_row: dict[int, Tensor] = {}
        for rows, group in zip(groups, maps, strict=True):
            by_row |= zip(rows, group[name], strict=True)
        height, width = (max(x.shape[i] for x in by_row.values()) for i in (-2, -1))
        ordered = [by_row[row] for row in sorted(by_row)]
        result[name] = torch.stack(
            [F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2])) for x in ordered]
        )
    return result


def content_masks(
    sizes: Sequence[Size], canvas: Size, features: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`content_mask` of each feature map {name: [B, C, h, w]}."""
    inference = torch.is_inference_mode_enabled()
    return {
        name: content_mask(tuple(sizes), canvas, tuple(x.shape[-2:]), x.device, inference)
        for name, x in features.items()
    }


@lru_cache(maxsize=256)
def content_mask(
    sizes: tuple[tuple[int, int], ...],
    canvas: tuple[int, int],
    shape: tuple[int, int],
    device: torch.device,
    inference: bool,
) -> Tensor:
    """Which cells of a feature map of `shape` (h, w) see the image, not padding: bool [B, h, w].

    The tensor is cached for each combination of arguments, so it must not be written to.
    `inference`: whether torch.inference_mode is on; its tensors, which autograd refuses, are cached
    apart from the others.
    """
    (h, w), mask = shape, torch.zeros(len(sizes), *shape, dtype=torch.bool)
    for i, (rows, columns) in enumerate(sizes):
        mask[i, : -(-rows * h // canvas[0]), : -(-columns * w // canvas[1])] = True
    return mask.to(device)
