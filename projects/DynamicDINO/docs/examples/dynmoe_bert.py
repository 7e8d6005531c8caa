"""DynMoE in a Hugging Face BERT encoder: how these layers take the place of any transformer's FFN.

DynMoE (arXiv 2405.14297) tunes BERT this way on GLUE. Its experts are parts of the FFN, found by
clustering (MoEfication); ours are whole copies, so that the encoder starts as it was. An example,
not a part of the package: nothing in the detectors needs it. tests/moe/test_bert.py trains it.
"""

from __future__ import annotations

import torch
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.routing import Routing
from dynamic_dino.moe.top_any import TopAnyRouter
from torch import Tensor, nn


class DynMoEFeedForward(MoEFeedForward):
    """An FFN of as many whole experts as each token takes; see `TopAnyRouter`."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int = 8,
        initial_experts: int | None = 6,
        activation: str = "relu",
    ) -> None:
        router = TopAnyRouter(dim, num_experts, initial_experts)
        super().__init__(dim, hidden, router, activation)

    @classmethod
    def from_linear(cls, linear1: nn.Linear, linear2: nn.Linear, **options) -> DynMoEFeedForward:
        """One whose experts start as the FFN of two linear layers. `options`: see the class."""
        layer = cls(linear1.in_features, linear1.out_features, **options)
        layer.load_state_dict(
            {
                f"{name}.{key}": value
                for name, linear in (("linear1", linear1), ("linear2", linear2))
                for key, value in linear.state_dict().items()
            }
        )
        return layer.to(linear1.weight.device)


class DynMoEBert(nn.Module):
    """A BERT encoder whose FFNs are DynMoE's; takes over the modules of a Hugging Face `BertModel`.

    In evaluation it gives that model's hidden states, until it is trained. Padding is not routed,
    so it neither costs anything nor counts as a token that no expert wanted.

    Raises:
        ValueError: the model's activation is not one that experts have.
    """

    def __init__(
        self, bert: nn.Module, num_experts: int = 8, initial_experts: int | None = 6
    ) -> None:
        super().__init__()
        activation = bert.config.hidden_act
        if activation not in ("relu", "gelu", "silu"):
            raise ValueError(f"experts have no activation {activation!r}: relu, gelu or silu")
        layers = bert.encoder.layer
        self.embeddings = bert.embeddings
        self.attention = nn.ModuleList(layer.attention for layer in layers)
        self.norms = nn.ModuleList(layer.output.LayerNorm for layer in layers)
        self.dropout = nn.Dropout(bert.config.hidden_dropout_prob)
        self.ffns = nn.ModuleList(
            DynMoEFeedForward.from_linear(
                layer.intermediate.dense,
                layer.output.dense,
                num_experts=num_experts,
                initial_experts=initial_experts,
                activation=activation,
            )
            for layer in layers
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, list[Routing]]:
        """input_ids, attention_mask int64 [B, L], 1 = real -> hidden states [B, L, C] (0 at
        padding), and one Routing per layer, of the real tokens"""
        x, routings = self.embeddings(input_ids), []
        real = attention_mask.bool()
        blocked = torch.zeros_like(x[:, None, None, :, 0]).masked_fill(
            ~real[:, None, None], torch.finfo(x.dtype).min
        )
        for attention, ffn, norm in zip(self.attention, self.ffns, self.norms, strict=True):
            tokens = attention(x, blocked)[0][real]
            y, routing = ffn(tokens[None])
            routings.append(routing)
            x = torch.zeros_like(x)
            x[real] = norm(tokens + self.dropout(y[0]))
        return x, routings
