"""From the decoder's last layer to Detectron2 `Instances`, batched and on the device."""

from __future__ import annotations

from numbers import Integral

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .losses.boxes import cxcywh_to_xyxy
from .phrases import Phrases
from .prompt import shown
from .structures import Detections, Predictions


def limit_of_detections(value: int, name: str = "max_detections") -> int:
    """Raises ValueError for what is no whole number of at least 1."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {shown(value)}")
    return int(value)


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
    """Merges the chunks of each image, keeps the `most` best (None: all), and scales boxes to its
    original size.

    Returns {"instances": Instances} for each sample, with pred_boxes (XYXY, pixels), scores,
    pred_classes (index of the phrase), queries (the row of each detection's query among all of the
    batch, as the decoder's `Routing`s have them) and phrases: to read those, the host waits for the
    device.
    """
    results = []
    for sample, chunks in zip(batch, found, strict=True):
        scores = torch.cat([c.scores for c in chunks])
        phrases = torch.cat([c.phrases for c in chunks])
        boxes = torch.cat([c.boxes for c in chunks])
        queries = torch.cat([c.rows for c in chunks])
        if len(chunks) > 1:
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
        result["instances"].phrases = Phrases(names[i] for i in indices[:count])
        indices = indices[count:]
    return results
