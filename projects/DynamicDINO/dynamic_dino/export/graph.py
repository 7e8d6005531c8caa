"""The graphs that are exported: a detector, and its text encoder."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

from ..modeling.detector import OpenVocabularyDetector
from ..modeling.postprocess import best_pairs
from ..modeling.structures import TextFeatures
from ..modeling.swin import PaddedBlock, shift_mask
from ..modeling.text import TextEncoder
from ..moe.layer import MoEFeedForward
from ..serving.deploy import ConvGELU, GELUInPlace, replace_modules
from .experts import StaticMoE


class StaticBlock(PaddedBlock):
    """`PaddedBlock` by padding, shifting and cutting: nothing is kept from call to call."""

    def _attn(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        window, shift = tuple(self.window_size), tuple(self.shift_size)
        more = [-size % w for size, w in zip((height, width), window, strict=True)]
        x = F.pad(x, (0, 0, 0, more[1], 0, more[0]))
        mask = None
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
            make = shift_mask.__wrapped__  # the cache would keep what tracing puts into it
            mask = make(height, width, window, shift, x.device, x.dtype, False)
        windows = window_partition(x, self.window_size).flatten(1, 2)
        windows = self.attn(windows, mask).unflatten(1, window)
        x = window_reverse(windows, self.window_size, height + more[0], width + more[1])
        if any(shift):
            x = x.roll(shift, (1, 2))
        return x[:, :height, :width]


def static_copy(model: OpenVocabularyDetector, experts: str) -> OpenVocabularyDetector:
    """A copy that shares the weights, without its text encoder, of modules that can be exported.

    Args:
        experts: "sparse", "tiles" or "all", see `experts.py`.
    """
    tensors = [*model.parameters(), *model.buffers()]
    shared = [*tensors, model.text_encoder, model.criterion, model.denoising]
    static = copy.deepcopy(model, {id(value): value for value in shared})
    static.text_encoder = static.criterion = static.denoising = None
    replaced: dict[nn.Module, nn.Module] = {}
    for module in static.modules():
        if isinstance(module, MoEFeedForward):
            replaced[module] = StaticMoE(module, experts)
        elif isinstance(module, ConvGELU):
            gelu = nn.GELU(module.approximate)
            replaced[module] = nn.Sequential(module.convolution, gelu)
        elif isinstance(module, GELUInPlace):
            replaced[module] = nn.GELU(module.approximate)
        elif isinstance(module, PaddedBlock):
            module.__class__ = StaticBlock
    replace_modules(static, replaced)
    return static.eval().requires_grad_(False)


class DetectorGraph(nn.Module):
    """Images on a square canvas, and what to look for, to the best (query, phrase) pairs.

    Args:
        model: what `static_copy` returns.
        size: side of the canvas, in pixels.
        text: of C prompts, whose features become constants; None: they are inputs.
        first: int64 [C], the index of the first phrase of each of them among all.
        most: pairs that are kept of an image.
    """

    def __init__(
        self,
        model: OpenVocabularyDetector,
        size: int,
        most: int,
        text: TextFeatures | None = None,
        first: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model, self.size, self.most = model, size, most
        self.baked = text is not None
        if text is not None:
            self.tokens, self.blocks = nn.Buffer(text.tokens.clone()), nn.Buffer(text.blocks)
            self.mask, self.phrase_map = nn.Buffer(text.mask), nn.Buffer(text.phrase_map)
            self.first = nn.Buffer(first)

    def forward(
        self,
        image: Tensor,
        content: Tensor,
        tokens: Tensor | None = None,
        blocks: Tensor | None = None,
        phrase_map: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The `most` best pairs of each image, best first.

        Args:
            image: uint8 [B, 3, S, S], RGB; the picture lies at the top left, the rest is anything.
            content: int64 [B, 2], height and width of the picture there, in pixels.
            tokens, blocks, phrase_map: see `TextFeatures`; tokens that pad have the block -1.

        Returns:
            scores float [B, K], phrases int64 [B, K], boxes float [B, K, 4], centre, width and
            height as parts of the picture. A score of -1 is none of a phrase.
        """
        features, masks = self._maps(image, content)
        if not self.baked:
            text = TextFeatures(tokens, blocks >= 0, blocks, phrase_map)
            return self._pairs(features, masks, text)[:3]
        batch, prompts = image.shape[0], self.first.shape[0]
        constants = (self.tokens, self.mask, self.blocks, self.phrase_map)
        text = TextFeatures(*(self._of_images(c, batch) for c in constants))
        if prompts == 1:
            return self._pairs(features, masks, text)[:3]
        features, masks = (
            {n: x.repeat_interleave(prompts, 0) for n, x in maps.items()}
            for maps in (features, masks)
        )
        scores, phrases, boxes = self._pairs(features, masks, text)
        phrases = phrases + self._of_images(self.first[:, None], batch)
        scores, phrases, boxes = (
            t.unflatten(0, (batch, prompts)).flatten(1, 2) for t in (scores, phrases, boxes)
        )
        scores, order = scores.topk(min(self.most, scores.shape[1]), 1)
        return (
            scores,
            phrases.gather(1, order),
            boxes.gather(1, order[..., None].expand(-1, -1, 4)),
        )

    @staticmethod
    def _of_images(constant: Tensor, batch: int) -> Tensor:
        """[C, ...] -> [B * C, ...]"""
        return constant.expand(batch, *constant.shape).flatten(0, 1)

    def _maps(self, image: Tensor, content: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`image_features` of images on the canvas."""
        model, side = self.model, torch.arange(self.size, device=image.device)
        x = (image.float() - model.pixel_mean) / model.pixel_std
        rows, columns = side < content[:, :1], side < content[:, 1:]
        inside = rows[:, None, :, None] & columns[:, None, None]
        x = torch.where(inside, x, 0.0)
        features = model.backbone(x.to(model.backbone.dtype))
        if model.neck is not None:
            features = model.neck(features)
        return features, {n: self._mask(content, f) for n, f in features.items()}

    def _mask(self, content: Tensor, feature: Tensor) -> Tensor:
        """`content_mask` of a map: bool [B, h, w]"""
        height, width = feature.shape[-2:]
        size = torch.tensor([height, width], device=content.device)
        cells = (content * size + self.size - 1).div(self.size, rounding_mode="floor")
        rows = torch.arange(height, device=content.device) < cells[:, :1]
        columns = torch.arange(width, device=content.device) < cells[:, 1:]
        return rows[:, :, None] & columns[:, None]

    def _pairs(
        self, features: dict[str, Tensor], masks: dict[str, Tensor], text: TextFeatures
    ) -> tuple[Tensor, Tensor, Tensor]:
        output = self.model.decode(features, masks, text)
        best = best_pairs(output.layers[-1], text.phrase_map, self.most)
        return best.scores, best.phrases, best.boxes


class TextGraph(nn.Module):
    """Texts, each encoded by itself, to features of the detector's width."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.body, self.proj, self.norm = encoder.body, encoder.proj, encoder.norm
        self.pooled = encoder.pooled

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64 [N, T] and [N, T], as a tokenizer gives them -> float [N, T, D], or, of an encoder
        that pools, [N, 1, D]"""
        x = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooled:
            weight = attention_mask[..., None].to(x.dtype)
            x = (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        return self.norm(self.proj(x))
