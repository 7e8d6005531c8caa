"""Experts in BERT: how these layers take the place of any transformer's FFN.

DynMoE (arXiv 2405.14297) tunes BERT this way on GLUE. Its experts are parts of the FFN, found by
clustering (MoEfication); ours are whole copies, so that the encoder starts as it was. An example,
not a part of the package: nothing in the detectors needs it. tests/moe/test_bert.py trains it, and
benchmarks/language.py and domains.py compare routers on a task of texts and one of objects.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from dynamic_dino.modeling.feed_forward import FeedForward
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.routers import Router
from dynamic_dino.moe.routing import Routing
from dynamic_dino.moe.top_any import TopAnyRouter
from torch import Tensor, nn


def top_any(dim: int) -> Router:
    """DynMoE's: 6 of at most 8 experts at the start."""
    return TopAnyRouter(dim, num_experts=8, initial_experts=6)


def from_linear(
    linear1: nn.Linear,
    linear2: nn.Linear,
    router: Callable[[int], Router] | None = top_any,
    activation: str = "relu",
) -> MoEFeedForward | FeedForward:
    """An FFN that starts as that of two linear layers: of experts, or dense without a router."""
    dim, hidden = linear1.in_features, linear1.out_features
    layer: MoEFeedForward | FeedForward
    if router is None:
        layer = FeedForward(dim, hidden, activation)
    else:
        layer = MoEFeedForward(dim, hidden, router(dim), activation)
    layer.load_state_dict(
        {
            f"{name}.{key}": value
            for name, linear in (("linear1", linear1), ("linear2", linear2))
            for key, value in linear.state_dict().items()
        }
    )
    return layer.to(linear1.weight.device)


class MoEBert(nn.Module):
    """A BERT encoder whose FFNs are mixtures; takes over the modules of a Hugging Face `BertModel`.

    In evaluation it gives that model's hidden states, until it is trained. Padding is not routed,
    so it neither costs anything nor counts as a token that no expert wanted.

    Args:
        router: makes one for a layer of that width; its experts are whole copies of the FFN. None:
            the FFNs stay dense.
        first: the layer from which on there are experts; those below it, and the embeddings, are
            left out: `layers` then takes the hidden states that enter this one.

    Raises:
        ValueError: the model's activation is not one that experts have.
    """

    def __init__(
        self, bert: nn.Module, router: Callable[[int], Router] | None = top_any, first: int = 0
    ) -> None:
        super().__init__()
        activation = bert.config.hidden_act
        if activation not in ("relu", "gelu", "silu"):
            raise ValueError(f"experts have no activation {activation!r}: relu, gelu or silu")
        layers = bert.encoder.layer[first:]
        self.embeddings = None if first else bert.embeddings
        self.attention = nn.ModuleList(layer.attention for layer in layers)
        self.norms = nn.ModuleList(layer.output.LayerNorm for layer in layers)
        self.dropout = nn.Dropout(bert.config.hidden_dropout_prob)
        self.ffns = nn.ModuleList(
            from_linear(layer.intermediate.dense, layer.output.dense, router, activation)
            for layer in layers
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, list[Routing]]:
        """input_ids, attention_mask int64 [B, L], 1 = real -> hidden states [B, L, C] (0 at
        padding), and one Routing per layer of experts, of the real tokens"""
        assert self.embeddings is not None, "made without embeddings: use `layers`"
        return self.layers(self.embeddings(input_ids), attention_mask)

    def layers(self, x: Tensor, attention_mask: Tensor) -> tuple[Tensor, list[Routing]]:
        """The same of hidden states [B, L, C]."""
        routings = []
        real = attention_mask.bool()
        blocked = torch.zeros_like(x[:, None, None, :, 0]).masked_fill(
            ~real[:, None, None], torch.finfo(x.dtype).min
        )
        for attention, ffn, norm in zip(self.attention, self.ffns, self.norms, strict=True):
            tokens = attention(x, blocked)[0][real]
            y, routing = ffn(tokens[None])
            if routing is not None:
                routings.append(routing)
            x = torch.zeros_like(x)
            x[real] = norm(tokens + self.dropout(y[0]))
        return x, routings
