"""From the decoder's last layer to Detectron2 `Instances`, batched and on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .losses.boxes import cxcywh_to_xyxy
from .structures import Predictions
from .text import Piece


@dataclass
class Detections:
    """The best (query, phrase) pairs, best first: of a batch, or of an image without its B.

    scores [B, K], phrases int64 [B, K] (index in the prompt), boxes [B, K, 4] (cx, cy, w, h), rows
    int64 [B, K] (which query, of `queries` an image)
    """

    scores: Tensor
    phrases: Tensor
    boxes: Tensor
    rows: Tensor
    queries: int

    def of_image(self, row: int, piece: Piece, before: int = 0) -> Detections:
        """Those of one piece of a prompt; its phrases get their places in the whole prompt, and its
        queries theirs behind the ones of the `before` pieces of the batch before it."""
        real = min(self.scores.shape[1], self.queries * len(piece.prompt.spans))  # less padding
        return Detections(
            self.scores[row, :real],
            self.phrases[row, :real] + piece.first,
            self.boxes[row, :real],
            self.rows[row, :real] + before * self.queries,
            self.queries,
        )


def best_pairs(last: Predictions, phrase_map: Tensor, most: int) -> Detections:
    """A phrase's score is the mean probability of its tokens; phrase_map float [B, P, L].

    Phrases that only pad the batch come last.
    """
    with torch.autocast(last.logits.device.type, enabled=False):  # bf16 would tie what it ranks
        scores = last.logits.float().sigmoid() @ phrase_map.transpose(1, 2)  # [B, Q, P]
    padding = (phrase_map == 0).all(-1)
    scores = scores.masked_fill(padding[:, None], -1.0)
    batch, queries, phrases = scores.shape
    scores, flat = scores.flatten(1).topk(min(most, queries * phrases))
    query = torch.div(flat, phrases, rounding_mode="floor")
    boxes = last.boxes.gather(1, query[..., None].expand(-1, -1, 4))
    return Detections(scores, flat % phrases, boxes, query, queries)


def to_instances(batch: list[dict], found: list[list[Detections]], most: int | None) -> list[dict]:
    """Merges the pieces of each image, keeps the `most` best (None: all), and scales boxes to its
    original size.

    Returns {"instances": Instances} for each sample, with pred_boxes (XYXY, pixels), scores,
    pred_classes (index of the phrase), queries (the row of each detection's query among all of the
    batch, as the decoder's `Routing`s have them) and phrases: to read those, the host waits for the
    device.
    """
    results = []
    for sample, pieces in zip(batch, found, strict=True):
        scores = torch.cat([p.scores for p in pieces])
        phrases = torch.cat([p.phrases for p in pieces])
        boxes = torch.cat([p.boxes for p in pieces])
        queries = torch.cat([p.rows for p in pieces])
        if len(pieces) > 1:
            scores, order = scores.sort(descending=True, stable=True)
            scores, order = scores[:most], order[:most]
            phrases, boxes, queries = phrases[order], boxes[order], queries[order]
        height, width = sample["height"], sample["width"]
        x0, y0, x1, y1 = cxcywh_to_xyxy(boxes).clamp(0, 1).unbind(-1)
        scaled = (x0 * width, y0 * height, x1 * width, y1 * height)
        result = Instances((height, width))
        result.pred_boxes = Boxes(torch.stack(scaled, -1))
        result.scores, result.pred_classes, result.queries = scores, phrases, queries
        results.append({"instances": result})
    classes = [result["instances"].pred_classes for result in results]
    indices = torch.cat(classes).tolist() if classes else []
    for sample, result in zip(batch, results, strict=True):
        names, count = sample["prompt"].phrases, len(result["instances"])
        result["instances"].phrases = [names[i] for i in indices[:count]]
        indices = indices[count:]
    return results
