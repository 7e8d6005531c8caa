"""The detector: the whole forward pass of (Dynamic-)DINO on one screen.

images -> backbone -> P3, P4, P5 ─┐
prompts -> text encoder ----------┴> enhancer -> query selection -> decoder -> detections

A closed-set detector has a `ClassVocabulary` for a text encoder, and nothing that reads its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..moe.routing import Routing
from ..moe.statistics import training_metrics
from .backbone import Backbone
from .decoder import Decoder
from .deformable_enhancer import DeformableEnhancer
from .enhancer import EdgeEnhancer
from .losses.boxes import xyxy_to_cxcywh
from .losses.criterion import Criterion
from .losses.denoising import Denoising
from .postprocess import Detections, best_pairs, to_instances
from .proposals import ProposalStatistics
from .query_selection import Queries, QuerySelection
from .structures import DetectorOutput, Predictions, Target, TextFeatures
from .text import TextEncoder
from .vocabulary import ClassVocabulary


class OpenVocabularyDetector(nn.Module):
    """Grounding DINO 1.5 Edge; Dynamic-DINO when the decoder's FFNs are mixtures of experts; DINO
    with a closed vocabulary.

    Args:
        criterion: the training losses; None builds a detector for inference only.
        denoising: contrastive denoising queries for training, optional.
        neck: maps of the backbone to those that the enhancer takes; None: they are the same.
        proposal_statistics: adds to the scene that the decoder's routers see, optional.
        canvas: side of the square that images are padded to; None pads each batch to its largest
            image. A square canvas makes the result independent of what else is in the batch.
        size_divisor: canvases are multiples of it, in pixels.
        pad_images: False: in evaluation, the backbone and the neck see each image without padding,
            and their maps are padded instead, so that the result depends on nothing else in the
            batch where there is no square canvas.
        max_phrases: longest prompt, in phrases, that is looked at in one piece at test time.
        max_detections: kept per image.
        max_detections_per: "piece" keeps that many of every piece of a split prompt, in an image
            as many as come together so (fixed AP: 300 per 40 names, and no cap per image).
        chunk_batch: how many (image, prompt piece) pairs go through the decoder at once.
        return_routings: in evaluation, adds the batch's `Routing`s to the first result.
    """

    def __init__(
        self,
        backbone: Backbone,
        text_encoder: TextEncoder | ClassVocabulary,
        enhancer: EdgeEnhancer | DeformableEnhancer,
        query_selection: QuerySelection,
        decoder: Decoder,
        criterion: Criterion | None = None,
        denoising: Denoising | None = None,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        neck: nn.Module | None = None,
        proposal_statistics: ProposalStatistics | None = None,
        canvas: int | None = None,
        size_divisor: int = 32,
        pad_images: bool = True,
        max_phrases: int | None = None,
        max_detections: int = 300,
        max_detections_per: Literal["image", "piece"] = "image",
        chunk_batch: int = 8,
        return_routings: bool = True,
    ) -> None:
        super().__init__()
        self.backbone, self.neck, self.text_encoder = backbone, neck, text_encoder
        self.enhancer, self.query_selection, self.decoder = enhancer, query_selection, decoder
        self.proposal_statistics = proposal_statistics
        self.criterion, self.denoising = criterion, denoising
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), False)
        self.canvas, self.size_divisor, self.pad_images = canvas, size_divisor, pad_images
        self.max_phrases, self.max_detections = max_phrases, max_detections
        self.max_detections_per = max_detections_per
        self.chunk_batch, self.return_routings = chunk_batch, return_routings

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batch: list[dict]) -> dict[str, Tensor | list[Routing]] | list[dict]:
        """Losses in training, with metrics and the mixtures' "routings"; detections in evaluation.

        Args:
            batch: mapped samples, see ``dynamic_dino.data.mapper``: "image" (uint8 [3, h, w], RGB)
                or cached "features", "image_size", "height", "width", "prompt", and "instances".
        """
        if not self.training:
            return self.inference(batch)
        if self.criterion is None:
            raise ValueError("this detector was built without a criterion, so it can't be trained")
        for sample in batch:
            if "caption" in sample:
                self.text_encoder.refuse_long_caption(sample["caption"], sample["file_name"])
        features, masks = self.image_features(batch)
        text = self.text_encoder([sample["prompt"] for sample in batch])
        targets = self.targets(batch)
        output = self.detect(features, masks, text, targets)
        losses = {**self.criterion(output, targets), **training_metrics(output.routings)}
        return losses | ({"routings": output.routings} if output.routings else {})

    def detect(
        self,
        features: dict[str, Tensor],
        masks: dict[str, Tensor],
        text: TextFeatures,
        targets: list[Target] | None = None,
    ) -> DetectorOutput:
        """Everything after the two towers; targets only serve the denoising queries."""
        memory, text, routings = self.enhancer(features, masks, text)
        queries, selection = self.query_selection(memory, text)
        if self.proposal_statistics is not None:
            memory = replace(memory, scene=self.proposal_statistics(memory.scene, selection))
        denoising = None
        if targets is not None and self.denoising is not None:
            denoising = self.denoising(targets, text, queries.content.shape[1])
        skip, mask = 0, None
        if denoising is not None:
            skip, mask = denoising.content.shape[1], ~denoising.attention_mask
            queries = Queries(
                torch.cat([denoising.content.to(queries.content.dtype), queries.content], 1),
                torch.cat([denoising.boxes, queries.boxes], 1),
            )
        decoded = self.decoder(queries, memory, text, mask)
        batch = len(queries.boxes)
        return DetectorOutput(
            layers=[Predictions(p.logits[:, skip:], p.boxes[:, skip:]) for p in decoded.layers],
            selection=selection,
            text=text,
            routings=routings + [r.slice_tokens(batch, skip) for r in decoded.routings],
            denoising=denoising,
            denoising_layers=[
                Predictions(p.logits[:, :skip], p.boxes[:, :skip])
                for p in decoded.layers
                if denoising is not None
            ],
        )

    # Images ------------------------------------------------------------------------------------
    def canvas_size(self, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """(height, width) that the batch is padded to, multiples of `size_divisor`."""
        height, width = (max(s[i] for s in sizes) for i in (0, 1))
        if self.canvas:
            if max(height, width) > self.canvas:
                raise ValueError(
                    f"an image of {height} x {width} pixels doesn't fit the canvas of "
                    f"{self.canvas}; resize it, or raise model.canvas"
                )
            height = width = self.canvas
        divisor = self.size_divisor
        return -(-height // divisor) * divisor, -(-width // divisor) * divisor

    def extract_features(self, images: Sequence[Tensor]) -> dict[str, Tensor]:
        """uint8 images [3, h, w] of any sizes -> backbone features of the padded canvas."""
        height, width = self.canvas_size([tuple(i.shape[-2:]) for i in images])
        normed = [(i.to(self.device) - self.pixel_mean) / self.pixel_std for i in images]
        padded = [F.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in normed]
        return self.backbone(torch.stack(padded).to(self.backbone.dtype))

    def image_features(self, batch: list[dict]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Features of the batch, computed or cached, and the masks of their real cells."""
        sizes = [tuple(sample["image_size"]) for sample in batch]
        if self.pad_images or self.training or len(set(sizes)) == 1:
            return self.padded_features(batch)
        features, masks = [{}] * len(batch), [{}] * len(batch)
        for size in set(sizes):
            alike = [i for i, other in enumerate(sizes) if other == size]
            maps, contents = self.padded_features([batch[i] for i in alike])
            for row, i in enumerate(alike):
                features[i] = {name: x[row] for name, x in maps.items()}
                masks[i] = {name: x[row] for name, x in contents.items()}
        return stack_padded(features), stack_padded(masks)

    def padded_features(self, batch: list[dict]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`image_features` of images that are padded to a common canvas."""
        sizes = tuple(tuple(sample["image_size"]) for sample in batch)
        height, width = self.canvas_size(sizes)
        if "features" in batch[0]:
            features = {
                name: torch.stack([s["features"][name].float() for s in batch]).to(self.device)
                for name in batch[0]["features"]
            }
            for (name, x), stride in zip(
                sorted(features.items()), self.backbone.strides, strict=True
            ):
                if x.shape[-2:] != (height // stride, width // stride):
                    raise ValueError(
                        f"cached features {name} are {x.shape[-2]} x {x.shape[-1]}, those of a "
                        f"canvas of {height} x {width} pixels {height // stride} x "
                        f"{width // stride}: make the cache for this model.canvas"
                    )
        else:
            features = self.extract_features([sample["image"] for sample in batch])
        if self.neck is not None:
            features = self.neck(features)
        # As the backbone gives them: maps become tokens without a copy.
        features = {n: x.contiguous(memory_format=torch.channels_last) for n, x in features.items()}
        masks = {
            name: content_mask(
                sizes,
                (height, width),
                tuple(x.shape[-2:]),
                self.device,
                torch.is_inference_mode_enabled(),
            )
            for name, x in features.items()
        }
        return features, masks

    def targets(self, batch: list[dict]) -> list[Target]:
        result = []
        for sample in batch:
            h, w = sample["image_size"]
            boxes = sample["instances"].gt_boxes.tensor / torch.tensor([w, h, w, h])
            labels = sample["instances"].gt_classes
            result.append(Target(xyxy_to_cxcywh(boxes).to(self.device), labels.to(self.device)))
        return result

    # Inference ---------------------------------------------------------------------------------
    def inference(self, batch: list[dict]) -> list[dict]:
        """Detects every phrase of every sample's prompt.

        Prompts that are too long are split. The backbone runs once per image whatever the number
        of pieces, and pieces of different images share decoder batches. A split prompt's result
        is that of its pieces detected one by one, merged by score. Nothing waits for the device
        before the results are read.
        """
        features, masks = self.image_features(batch)
        pieces = [
            (i, piece)
            for i, sample in enumerate(batch)
            for piece in self.text_encoder.pieces(sample["prompt"], self.max_phrases)
        ]
        found: list[list[Detections]] = [[] for _ in batch]
        routings: list[list[Routing]] = []
        for start in range(0, len(pieces), self.chunk_batch):
            chunk = pieces[start : start + self.chunk_batch]
            rows = [i for i, _ in chunk]
            chosen = [features, masks]
            if rows != list(range(len(batch))):
                chosen = [
                    {n: torch.stack([x[i] for i in rows]) for n, x in maps.items()}
                    for maps in chosen
                ]
            text = self.text_encoder([piece.prompt for _, piece in chunk])
            best, chunk_routings = self.search(*chosen, text, self.return_routings)
            routings.append(chunk_routings)
            for row, (i, piece) in enumerate(chunk):
                found[i].append(best.of_image(row, piece, start + row))
        most = self.max_detections if self.max_detections_per == "image" else None
        results = to_instances(batch, found, most)
        if self.return_routings and results:
            results[0]["routings"] = [Routing.cat(layer) for layer in zip(*routings, strict=True)]
        return results

    def search(
        self,
        features: dict[str, Tensor],
        masks: dict[str, Tensor],
        text: TextFeatures,
        routings: bool = False,
    ) -> tuple[Detections, list[Routing]]:
        """The best (query, phrase) pairs: all of inference between features and results. The
        mixtures' routings only if they are wanted, since a CUDA graph's results must be copied."""
        output = self.detect(features, masks, text)
        best = best_pairs(output.layers[-1], output.text.phrase_map, self.max_detections)
        return best, output.routings if routings else []


def stack_padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Each image's maps {name: [..., h, w]}, of several sizes -> {name: [B, ..., H, W]}, filled up
    with zeros (False)."""
    result = {}
    for name in rows[0]:
        maps = [row[name] for row in rows]
        height, width = (max(x.shape[i] for x in maps) for i in (-2, -1))
        result[name] = torch.stack(
            [F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2])) for x in maps]
        )
    return result


@lru_cache(maxsize=256)
def content_mask(
    sizes: tuple[tuple[int, int], ...],
    canvas: tuple[int, int],
    shape: tuple[int, int],
    device: torch.device,
    inference: bool,
) -> Tensor:
    """Which cells of a feature map [h, w] see the image and not its padding: bool [B, h, w].

    Made once for each combination, and not to be written to. `inference` keeps tensors of inference
    mode, which autograd refuses, apart from others.
    """
    (h, w), mask = shape, torch.zeros(len(sizes), *shape, dtype=torch.bool)
    for i, (rows, columns) in enumerate(sizes):
        mask[i, : -(-rows * h // canvas[0]), : -(-columns * w // canvas[1])] = True
    return mask.to(device)
