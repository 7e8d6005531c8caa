"""Decoder of Grounding DINO and of DINO; its FFNs are what Dynamic-DINO turns into experts."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..moe.routing import Routing
from .attention import DeformableAttention, MultiHeadAttention, box_encoding, clone_layers
from .heads import BoxHead, ContrastiveHead, LinearHead
from .structures import DecoderOutput, ImageMemory, Predictions, Queries, TextFeatures


class DecoderLayer(nn.Module):
    """Self-attention, text cross-attention, deformable image cross-attention, FFN; post-norm.

    Args:
        ffn: `FeedForward` (dense) or `MoEFeedForward`; called as ffn(x, scene, norm).
        attend_text: False leaves out the attention to the text, as in DINO.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        image_attention: DeformableAttention,
        ffn: nn.Module,
        dropout: float = 0.0,
        attend_text: bool = True,
    ) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(dim, heads, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.text_attention = MultiHeadAttention(dim, heads, dropout) if attend_text else None
        self.norm2 = nn.LayerNorm(dim) if attend_text else None
        self.image_attention = image_attention
        self.norm3 = nn.LayerNorm(dim)
        self.ffn = ffn
        self.norm4 = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        boxes: Tensor,
        position: Tensor,
        memory: ImageMemory,
        text: TextFeatures,
        attention_mask: Tensor | None,
    ) -> tuple[Tensor, Routing | None]:
        """x, position [B, N, D], boxes [B, N, 4]; attention_mask bool [1, N, N], True = attend"""
        q = x + position
        x = self.norm1(x + self.self_attention(q, q, x, attention_mask))
        if self.text_attention is not None and self.norm2 is not None:
            x = self.norm2(
                x + self.text_attention(x + position, text.tokens, text.tokens, text.mask[:, None])
            )
        x = self.norm3(
            x
            + self.image_attention(
                x + position, boxes, memory.tokens, memory.mask, memory.shapes, memory.valid_ratios
            )
        )
        return self.ffn(x, memory.scene, self.norm4)


class PositionMLP(nn.Module):
    """Encodes reference boxes as query positions (DAB-DETR)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.layers = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, boxes: Tensor) -> Tensor:
        encoding = box_encoding(boxes, self.dim // 2)
        bias = self.layers[0].bias  # the weight may be packed
        assert isinstance(bias, Tensor)
        return self.layers(encoding.to(bias.dtype))


class Decoder(nn.Module):
    """Layers that refine boxes step by step: each starts from the last one's, without gradient.

    Args:
        separate_heads: each layer has a class and a box head of its own (MM-Grounding-DINO).
        refine_normed: the boxes that the next layer starts from are the predicted ones, which the
            box head reads off the normalised queries. False, as the code of DINO and Grounding
            DINO: the head reads them off the queries themselves.
        canvas_positions: encodes the boxes as parts of the padded canvas, not of the image, as the
            code of Grounding DINO does: results then depend on the padding of the batch.
        look_forward_twice: a layer's box loss also trains the refinement of the layer before, whose
            boxes it starts from (DINO, section 3.5). The boxes are the same.
    """

    def __init__(
        self,
        dim: int,
        layer: DecoderLayer,
        num_layers: int,
        class_head: ContrastiveHead | LinearHead,
        grad_checkpointing: bool = False,
        separate_heads: bool = False,
        refine_normed: bool = True,
        canvas_positions: bool = False,
        look_forward_twice: bool = False,
    ) -> None:
        super().__init__()
        self.layers = clone_layers(layer, num_layers)
        self.norm = nn.LayerNorm(dim)
        self.position = PositionMLP(dim)
        box_head = BoxHead(dim)
        self.class_head: nn.Module = class_head
        self.box_head: nn.Module = box_head
        if separate_heads:
            self.class_head = clone_layers(class_head, num_layers)
            self.box_head = clone_layers(box_head, num_layers)
        self.refine_normed, self.canvas_positions = refine_normed, canvas_positions
        self.look_forward_twice = look_forward_twice
        self.grad_checkpointing = grad_checkpointing

    def forward(
        self,
        queries: Queries,
        memory: ImageMemory,
        text: TextFeatures,
        attention_mask: Tensor | None = None,
    ) -> DecoderOutput:
        """attention_mask: bool [N, N], True where a query may attend to another; None = all"""
        x, boxes, start = queries.content, queries.boxes, queries.boxes
        mask = None if attention_mask is None else attention_mask[None]
        output = DecoderOutput([], [])
        ratios = memory.valid_ratios[:, :1].repeat(1, 1, 2) if self.canvas_positions else 1.0
        for layer, class_head, box_head in zip(self.layers, *self._heads(), strict=True):
            arguments = (x, boxes, self.position(boxes * ratios), memory, text, mask)
            if self.grad_checkpointing and self.training:
                x, routing = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x, routing = layer(*arguments)
            if routing is not None:
                output.routings.append(routing)
            normed = self.norm(x)
            logits = class_head(normed, text.tokens, text.mask)
            refined = box_head(normed, start)  # `start` is `boxes`, with or without a gradient
            output.layers.append(Predictions(logits, refined))
            if layer is self.layers[-1]:
                break
            if start is not boxes or not self.refine_normed:
                refined = box_head(normed if self.refine_normed else x, boxes)
            boxes = refined.detach()
            start = refined if self.look_forward_twice and self.training else boxes
        return output

    def _heads(self) -> list[list[nn.Module]]:
        """Class and box heads, one for each layer."""
        return [
            list(head) if isinstance(head, nn.ModuleList) else [head] * len(self.layers)
            for head in (self.class_head, self.box_head)
        ]
