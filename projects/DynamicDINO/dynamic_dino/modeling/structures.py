"""The values that travel between the modules of the detector, in the order in which they come:

TextFeatures, ImageMemory -> Queries -> DecoderOutput -> DetectorOutput -> losses, or Detections

`Prompt` has a module of its own, as it is made and read where no tensor is; `Routing` belongs to
`dynamic_dino.moe`.

B images, Q queries, L text tokens (of a closed set: classes), P phrases of a prompt, D channels.
Boxes are ``cx, cy, w, h`` in [0, 1], relative to the content of the image, that is, without the
padding of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from ..moe.routing import Routing
from .prompt import Prompt


@dataclass
class TextFeatures:
    """Encoded prompts.

    tokens:      float [B, L, D]
    mask:        bool [B, L], True where a token is real, False where it pads the batch
    blocks:      int64 [B, L], the phrase block of each token; tokens attend within their block only
    phrase_map:  float [B, P, L], row p averages the tokens of phrase p; all-zero rows pad the batch
    """

    tokens: Tensor
    mask: Tensor
    blocks: Tensor
    phrase_map: Tensor

    def replace_tokens(self, tokens: Tensor) -> TextFeatures:
        return TextFeatures(tokens, self.mask, self.blocks, self.phrase_map)

    def padded(self, multiple: int) -> TextFeatures:
        """Padded on to a number of tokens, and one of phrases, that `multiple` divides."""
        phrases, tokens = (-n % multiple for n in self.phrase_map.shape[1:])
        return TextFeatures(
            F.pad(self.tokens, (0, 0, 0, tokens)),
            F.pad(self.mask, (0, tokens), value=False),
            F.pad(self.blocks, (0, tokens), value=-1),
            F.pad(self.phrase_map, (0, tokens, 0, phrases)),
        )


@dataclass(frozen=True)
class PromptChunk:
    """A part of a long prompt, as a prompt of its own, and the index of its first phrase in it."""

    prompt: Prompt
    first: int


@dataclass
class ImageMemory:
    """Enhanced image features, all levels in one sequence.

    tokens        float [B, S, D], levels from fine to coarse, row-major
    mask          bool [B, S], True inside the image, False in the padding
    shapes        (height, width) of each level
    valid_ratios  float [B, levels, 2], content over canvas, (width, height)
    scene         float [B, D], the mean over the content of the coarsest level; for the
                  decoder, what `OpenVocabularyDetector.scene` makes of it
    """

    tokens: Tensor
    mask: Tensor
    shapes: list[tuple[int, int]]
    valid_ratios: Tensor
    scene: Tensor


@dataclass
class Queries:
    """What the decoder starts from: content [B, Q, D] and reference boxes [B, Q, 4], detached."""

    content: Tensor
    boxes: Tensor


@dataclass
class Predictions:
    """One layer's detections: logits [B, Q, L] over text tokens, boxes [B, Q, 4]."""

    logits: Tensor
    boxes: Tensor


@dataclass
class DecoderOutput:
    """layers: predictions of each layer, of every query; routings: one per MoE layer"""

    layers: list[Predictions]
    routings: list[Routing]


@dataclass
class Target:
    """Ground truth of one image: boxes [N, 4]; labels int64 [N], each a phrase of its prompt."""

    boxes: Tensor
    labels: Tensor


@dataclass
class DenoisingQueries:
    """Noised ground truth that the decoder learns to restore (DINO's contrastive denoising).

    content         float [B, M, D], query features
    boxes           float [B, M, 4], noised reference boxes
    attention_mask  bool [M + Q, M + Q], True where attention is forbidden
    target_index    int64 [B, M], the index of the image's target to restore, -1 = "no object"
    valid           bool [B, M], False where a slot only pads the batch
    groups          number of denoising groups, the loss normaliser counts each object once a group
    """

    content: Tensor
    boxes: Tensor
    attention_mask: Tensor
    target_index: Tensor
    valid: Tensor
    groups: int


@dataclass
class DetectorOutput:
    """Everything that the criterion, the post-processing and the analysis read."""

    layers: list[Predictions]  # decoder layers, first to last; matching queries only
    selection: Predictions  # of the query selection, the "encoder output" of two-stage DETRs
    text: TextFeatures
    routings: list[Routing] = field(default_factory=list)  # one per MoE layer, matching queries
    denoising: DenoisingQueries | None = None
    denoising_layers: list[Predictions] = field(default_factory=list)


@dataclass
class Detections:
    """The best (query, phrase) pairs, best first: of a batch, or of one image (without the B).

    scores   float [B, K]
    phrases  int64 [B, K], index in the prompt
    boxes    float [B, K, 4]
    rows     int64 [B, K], index of the query
    queries  how many queries each image has
    """

    scores: Tensor
    phrases: Tensor
    boxes: Tensor
    rows: Tensor
    queries: int

    def of_image(self, row: int, chunk: PromptChunk, before: int = 0) -> Detections:
        """Those of row `row`, the image's share of one chunk of a prompt, without padding.

        Phrases get their indices in the whole prompt; queries their rows in the routings of the
        whole evaluation batch, where `before` chunks come before this one.
        """
        real = min(self.scores.shape[1], self.queries * len(chunk.prompt.spans))  # less padding
        return Detections(
            self.scores[row, :real],
            self.phrases[row, :real] + chunk.first,
            self.boxes[row, :real],
            self.rows[row, :real] + before * self.queries,
            self.queries,
        )
