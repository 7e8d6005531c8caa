"""Small objects in huge images: looked at in tiles, and once as a whole.

A detector shrinks every image to the size that it was trained on; what is smaller than a few pixels
then is lost. Our own loop: `sahi` brings opencv-python, which must not be installed beside the
headless one, fire and shapely. `supervision.InferenceSlicer` would do without these; it doesn't
look at the whole image, in which alone things larger than a tile are found, and it keeps the pieces
that tiles cut off things which another tile sees whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, Instances, pairwise_ioa
from torch import Tensor

from ..data.images import ImageLike, as_array
from ..modeling.phrases import Phrases
from .inference import Detector
from .prompts import PromptLike, as_prompt, prompts_of_images
from .suppression import groups_of, unsuppressed

TILE, OVERLAP = 640, 0.2
MERGE = 0.5  # intersection over union from which boxes of two tiles are of one object
COVERED = 0.5  # the part of a piece that lies in a box of the whole object
SMALLEST = 32  # pixels of a tile
EDGE = 0.01  # of a tile: a box as near to its border is cut off by it


class TiledDetector:
    """A `Detector`, called like one, that looks at each image in tiles too; see `detect_tiled`.

    Everything else, such as ``threshold`` and ``batch_size``, is the detector's. Raises ValueError
    for a tile of less than 32 pixels and an overlap that isn't from 0 to 0.9.
    """

    def __init__(self, detector: Detector, tile: int = TILE, overlap: float = OVERLAP) -> None:
        if tile < SMALLEST or tile != int(tile):
            raise ValueError(f"tile {tile} must be a whole number of pixels, {SMALLEST} or more")
        if not 0 <= overlap <= 0.9:
            raise ValueError(f"overlap {overlap:g} of tiles is not between 0 and 0.9")
        self.detector, self.tile, self.overlap = detector, int(tile), overlap

    def __getattr__(self, name: str) -> Any:
        if name == "detector":  # while it is copied or unpickled, and has none yet
            raise AttributeError(name)
        return getattr(self.detector, name)

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike],
        prompts: PromptLike | Sequence[PromptLike] | None = None,
        *options: Any,
        **named: Any,
    ) -> Instances | list[Instances]:
        """As `Detector.__call__`, with its options."""
        prompts = self.detector.all_classes() if prompts is None else prompts
        if not isinstance(images, list | tuple):
            return self._detect(images, as_prompt(prompts), *options, **named)
        each = zip(images, prompts_of_images(prompts, len(images)), strict=True)
        return [self._detect(image, prompt, *options, **named) for image, prompt in each]

    def _detect(
        self,
        image: ImageLike,
        prompt: PromptLike,
        threshold: float | None = None,
        max_detections: int | None = None,
        nms: float | None = None,
        nms_agnostic: bool | None = None,
    ) -> Instances:
        pixels = as_array(image)
        height, width = pixels.shape[:2]
        options = (threshold, max_detections, nms, nms_agnostic)
        found = self.detector(pixels, prompt, *options)
        places = tiles(width, height, self.tile, self.overlap)
        if len(places) == 1:
            return found
        parts, cut = [found], [torch.zeros(len(found), dtype=torch.bool)]
        for start in range(0, len(places), self.detector.batch_size):
            batch = places[start : start + self.detector.batch_size]
            crops = [pixels[y0:y1, x0:x1] for x0, y0, x1, y1 in batch]
            for part, place in zip(
                self.detector(crops, [prompt] * len(crops), *options), batch, strict=True
            ):
                parts.append(_moved(part, place, (height, width)))
                edge = max(1.0, EDGE * self.tile)
                cut.append(_cut_off(parts[-1].pred_boxes.tensor, place, (width, height), edge))
        overlap = self.detector.nms if nms is None else nms
        agnostic = self.detector.nms_agnostic if nms_agnostic is None else nms_agnostic
        merged = Instances.cat(parts)
        kept = _merged(merged, torch.cat(cut), MERGE if overlap is None else overlap, agnostic)
        return merged[kept[:max_detections]]


def detect_tiled(
    detector: Detector,
    image: ImageLike,
    prompt: PromptLike,
    tile: int = TILE,
    overlap: float = OVERLAP,
    **options: Any,
) -> Instances:
    """Finds the phrases in the whole image and in square tiles of it.

    Of boxes of one phrase that overlap, by `nms` (default: the detector's, else 0.5), the best is
    kept. A box that the border of its tile cuts off is a piece: it is dropped where at least half
    of it lies in a box that isn't. So an object that is smaller than the overlap is whole in a tile
    at least, and a larger one where the look at the whole image finds it.

    Args:
        tile: its side in pixels of the image; twice what the recipe resizes images to is fast, that
            itself finds the smallest.
        overlap: of neighbours, as a part of the side; 0 to 0.9.
        options: of `Detector.__call__`; `max_detections` holds for a tile and for the whole image,
            which is without a limit by default.

    Returns and raises what `Detector.__call__` does.
    """
    return TiledDetector(detector, tile, overlap)(image, prompt, **options)


def tiles(width: int, height: int, tile: int, overlap: float) -> list[tuple[int, int, int, int]]:
    """(x0, y0, x1, y1) of tiles that cover an image, evenly spaced, the last at its border: row by
    row. One that is the whole image, where that isn't larger."""
    columns, rows = (_starts(side, tile, overlap) for side in (width, height))
    return [(x, y, min(x + tile, width), min(y + tile, height)) for y in rows for x in columns]


def _starts(side: int, tile: int, overlap: float) -> list[int]:
    if side <= tile:
        return [0]
    step = max(1, int(tile * (1 - overlap)))
    gaps = -(-(side - tile) // step)
    return [round(i * (side - tile) / gaps) for i in range(gaps + 1)]


def _moved(found: Instances, place: tuple[int, int, int, int], size: tuple[int, int]) -> Instances:
    """From a tile's pixels to the image's."""
    offset = torch.tensor([*place[:2], *place[:2]])
    fields = found.get_fields() | {"pred_boxes": Boxes(found.pred_boxes.tensor + offset)}
    moved = Instances(size)
    for name, value in fields.items():
        moved.set(name, Phrases(value) if name == "phrases" else value)
    return moved


def _cut_off(
    boxes: Tensor, place: tuple[int, int, int, int], size: tuple[int, int], edge: float
) -> Tensor:
    """bool [K]: which boxes end at a border of the tile that isn't one of the image."""
    x0, y0, x1, y1 = place
    inner = torch.tensor([x0 > 0, y0 > 0, x1 < size[0], y1 < size[1]])
    return (((boxes - torch.tensor(place)).abs() <= edge) & inner).any(1)


def _merged(found: Instances, cut: Tensor, iou: float, agnostic: bool) -> Tensor:
    """Indices of what is kept, best first."""
    whole, pieces = (
        rows[unsuppressed(found[rows], iou, agnostic)]
        for rows in (torch.nonzero(~cut)[:, 0], torch.nonzero(cut)[:, 0])
    )
    groups = groups_of(found.phrases, agnostic)
    inside = pairwise_ioa(found.pred_boxes[whole], found.pred_boxes[pieces])  # of the pieces
    alike = groups[whole][:, None] == groups[pieces]
    covered = (alike & (inside >= COVERED)).any(0)
    kept = torch.cat([whole, pieces[~covered]])
    return kept[found.scores[kept].argsort(descending=True, stable=True)]
