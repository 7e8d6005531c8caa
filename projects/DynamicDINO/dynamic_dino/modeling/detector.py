"""The detector: the whole forward pass of (Dynamic-)DINO on one screen.

images -> backbone -> P3, P4, P5 ─┐
prompts -> text encoder ----------┴> enhancer -> query selection -> decoder -> detections

forward(batch)    losses in training, what `detect` finds in evaluation
image_features    images -> backbone -> neck
decode            all that follows the backbone and the text encoder, in training and evaluation
detect(batch)     prompts in chunks, through `detect_chunks`, to Detectron2's `Instances`

A closed-set detector has a `ClassVocabulary` for a text encoder, and nothing that reads its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..moe.routing import Routing
from ..moe.scene_router import SceneRouter
from ..moe.statistics import training_metrics
from .backbone import Backbone
from .decoder import Decoder
from .deformable_enhancer import DeformableEnhancer
from .enhancer import EdgeEnhancer, masked_mean
from .losses.criterion import Criterion, mean_objects
from .losses.denoising import Denoising
from .postprocess import best_pairs, limit_of_detections, to_instances
from .preprocess import (
    cached_features,
    canvas_size,
    content_masks,
    distinct_images,
    merge_maps,
    padded_images,
    rows_by_size,
    select_rows,
    targets_of,
)
from .proposals import ProposalStatistics
from .query_selection import QuerySelection
from .structures import (
    Detections,
    DetectorOutput,
    ImageMemory,
    Predictions,
    Queries,
    Target,
    TextFeatures,
)
from .text import TextEncoder
from .vocabulary import ClassVocabulary


class OpenVocabularyDetector(nn.Module):
    """Grounding DINO 1.5 Edge; Dynamic-DINO when the decoder's FFNs are mixtures of experts; DINO
    with a closed vocabulary.

    Args:
        criterion: the training losses; None builds a detector for inference only.
        denoising: contrastive denoising queries for training, optional.
        neck: maps of the backbone to those that the enhancer takes; None: they are the same.
        scene_levels: whose mean is the scene that the decoder's routers see: of the "coarsest"
            level, or of "all" of the enhanced image features.
        proposal_statistics: adds to that scene, optional.
        scene_router: turns it into the routes' probabilities, once for all of the decoder's
            routers, which have ``shared_scene=True`` then; optional.
        canvas: side of the square that images are padded to; None pads each batch to its largest
            image. A square canvas makes the result independent of what else is in the batch.
        size_divisor: canvases are multiples of it, in pixels.
        pad_images: False: in evaluation, the backbone and the neck see each image without padding,
            and their maps are padded instead, so that the result depends on nothing else in the
            batch where there is no square canvas.
        max_phrases: at test time, longer prompts are split into chunks of so many phrases.
        max_detections: kept per image, unless a call asks for another number.
        max_detections_per: "chunk" keeps that many of every chunk of a split prompt, in an image
            as many as come together so (fixed AP: 300 per 40 names, and no cap per image).
        chunk_batch: how many (image, chunk) pairs go through the decoder at once.
        return_routings: in evaluation, adds the batch's `Routing`s to the first result, see
            `detect`.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

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
        scene_levels: Literal["coarsest", "all"] = "coarsest",
        proposal_statistics: ProposalStatistics | None = None,
        scene_router: SceneRouter | None = None,
        canvas: int | None = None,
        size_divisor: int = 32,
        pad_images: bool = True,
        max_phrases: int | None = None,
        max_detections: int = 300,
        max_detections_per: Literal["image", "chunk"] = "image",
        chunk_batch: int = 8,
        return_routings: bool = True,
    ) -> None:
        super().__init__()
        self.backbone, self.neck, self.text_encoder = backbone, neck, text_encoder
        self.enhancer, self.query_selection, self.decoder = enhancer, query_selection, decoder
        self.scene_levels = scene_levels
        self.proposal_statistics, self.scene_router = proposal_statistics, scene_router
        self.criterion, self.denoising = criterion, denoising
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), False)
        self.canvas, self.size_divisor, self.pad_images = canvas, size_divisor, pad_images
        self.max_phrases = max_phrases
        self.max_detections = limit_of_detections(max_detections, "model.max_detections")
        self.max_detections_per = max_detections_per
        self.chunk_batch, self.return_routings = chunk_batch, return_routings

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(
        self,
        batch: list[dict],
        max_detections: int | None = None,
        objects: Tensor | None = None,
    ) -> dict[str, Tensor | list[Routing]] | list[dict]:
        """Losses in training, with metrics and the mixtures' "routings"; detections in evaluation.

        Args:
            batch: mapped samples, see ``dynamic_dino.data.mapper``: "image" (uint8 [3, h, w], RGB)
                or cached "features", "image_size", "height", "width", "prompt", and "instances".
            max_detections: in evaluation, instead of the detector's.
            objects: in training, what `mean_objects` says of all batches whose gradients are
                accumulated; by default, of this one.
        """
        if not self.training:
            return self.detect(batch, max_detections)
        if self.criterion is None:
            raise ValueError("this detector was built without a criterion, so it can't be trained")
        for sample in batch:
            if "caption" in sample:
                self.text_encoder.refuse_long_caption(sample["caption"], sample["file_name"])
        features, masks = self.image_features(batch)
        text = self.text_encoder([sample["prompt"] for sample in batch])
        targets = targets_of(batch, self.device)
        output = self.decode(features, masks, text, targets)
        losses = self.criterion(output, targets, objects)
        losses |= training_metrics(output.routings)
        return losses | ({"routings": output.routings} if output.routings else {})

    def mean_objects(self, batches: Sequence[list[dict]]) -> Tensor:
        """What the losses of all these batches are divided by when their gradients are accumulated,
        see `forward`. Collective."""
        counts = [sum(len(sample["instances"]) for sample in batch) for batch in batches]
        return mean_objects(counts, self.device)

    def scene(self, memory: ImageMemory, selection: Predictions) -> Tensor:
        """What the decoder's routers know of the image: [B, D], or [B, R] of a scene router"""
        scene = memory.scene
        if self.scene_levels == "all":
            scene = masked_mean(memory.tokens, memory.mask)
        if self.proposal_statistics is not None:
            scene = self.proposal_statistics(scene, selection)
        return scene if self.scene_router is None else self.scene_router(scene)

    def decode(
        self,
        features: dict[str, Tensor],
        masks: dict[str, Tensor],
        text: TextFeatures,
        targets: list[Target] | None = None,
    ) -> DetectorOutput:
        """All that follows the backbone and the text encoder.

        Args:
            features, masks: what `image_features` returns.
            targets: in training, what the denoising queries are made of.
        """
        memory, text, routings = self.enhancer(features, masks, text)
        queries, selection = self.query_selection(memory, text)
        memory = replace(memory, scene=self.scene(memory, selection))
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
        batch = queries.boxes.shape[0]  # len() of a traced tensor would fix it
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
    def extract_features(self, images: Sequence[Tensor]) -> dict[str, Tensor]:
        """uint8 images [3, h, w] of any sizes -> backbone features {name: [B, C, H, W]} of their
        common canvas. Raises ValueError for an image that is larger than `canvas`."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        canvas = canvas_size(sizes, self.canvas, self.size_divisor)
        padded = padded_images(images, canvas, self.pixel_mean, self.pixel_std)
        return self.backbone(padded.to(self.backbone.dtype))

    def image_features(self, batch: list[dict]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Features of the batch, computed or cached, {name: [B, C, H, W]}, and which of their cells
        see an image, {name: bool [B, H, W]}."""
        groups = rows_by_size([tuple(sample["image_size"]) for sample in batch])
        if self.pad_images or self.training or len(groups) == 1:
            return self._features_on_canvas(batch)
        found = [self._features_on_canvas([batch[i] for i in rows]) for rows in groups]
        features, masks = [f for f, _ in found], [m for _, m in found]
        return merge_maps(groups, features), merge_maps(groups, masks)

    def _features_on_canvas(self, batch: list[dict]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`image_features` of images that are padded to a common canvas."""
        sizes = [tuple(sample["image_size"]) for sample in batch]
        canvas = canvas_size(sizes, self.canvas, self.size_divisor)
        if "features" in batch[0]:
            features = cached_features(batch, canvas, self.backbone.strides, self.device)
        else:
            features = self.extract_features([sample["image"] for sample in batch])
        if self.neck is not None:
            features = self.neck(features)
        # As the backbone gives them: maps become tokens without a copy.
        features = {n: x.contiguous(memory_format=torch.channels_last) for n, x in features.items()}
        return features, content_masks(sizes, canvas, features)

    # Inference ---------------------------------------------------------------------------------
    def detect(self, batch: list[dict], max_detections: int | None = None) -> list[dict]:
        """Finds every phrase of every sample's prompt: {"instances": Instances} for each sample,
        see `to_instances`. With `return_routings`, the first result also has "routings": the
        batch's `Routing`s, one per MoE layer, as one image's can't be told apart in it.

        Prompts that are too long are split into chunks. The backbone runs once per image, also for
        several chunks, and for samples that share the tensor of an image; chunks of different
        images share decoder batches. A split prompt's result is that of its chunks detected one by
        one, merged by score. Nothing waits for the device before the results are read.
        """
        most = self.max_detections if max_detections is None else max_detections
        shown, image = distinct_images(batch)
        features, masks = self.image_features(shown)
        chunks = [
            (i, chunk)
            for i, sample in enumerate(batch)
            for chunk in self.text_encoder.chunks(sample["prompt"], self.max_phrases)
        ]
        found: list[list[Detections]] = [[] for _ in batch]
        routings: list[list[Routing]] = []
        for start in range(0, len(chunks), self.chunk_batch):
            together = chunks[start : start + self.chunk_batch]
            rows = [image[i] for i, _ in together]
            maps, cells = features, masks
            if rows != list(range(len(shown))):
                maps, cells = select_rows(maps, rows), select_rows(cells, rows)
            text = self.text_encoder([chunk.prompt for _, chunk in together])
            best, routed = self.detect_chunks(maps, cells, text, self.return_routings, most)
            routings.append(routed)
            for row, (i, chunk) in enumerate(together):
                found[i].append(best.of_image(row, chunk, start + row))
        per_image = self.max_detections_per == "image"
        results = to_instances(batch, found, most if per_image else None)
        if self.return_routings and results:
            results[0]["routings"] = [Routing.cat(layer) for layer in zip(*routings, strict=True)]
        return results

    def detect_chunks(
        self,
        features: dict[str, Tensor],
        masks: dict[str, Tensor],
        text: TextFeatures,
        routings: bool = False,
        most: int | None = None,
    ) -> tuple[Detections, list[Routing]]:
        """The best (query, phrase) pairs of a batch of (image, chunk): `decode` and `best_pairs`.

        A function of tensors alone, so that it can be compiled or captured. `routings` returns the
        MoE layers' as well: not by default, since a CUDA graph's results must be copied.
        """
        output = self.decode(features, masks, text)
        best = best_pairs(output.layers[-1], output.text.phrase_map, most or self.max_detections)
        return best, output.routings if routings else []
