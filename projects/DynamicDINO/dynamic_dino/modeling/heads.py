"""Detection heads: class heads over text tokens and over classes, and a box head."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ContrastiveHead(nn.Module):
    """Similarity of queries to text tokens: x t^T * scale + bias, -inf on padded tokens.

    Grounding DINO has neither scale nor bias; a model that trains from scratch needs both, because
    products of layer-normalised vectors have a standard deviation of sqrt(D). The bias starts at
    -log(99), a prior probability of 0.01 as in RetinaNet (section 4.1).
    """

    def __init__(self, dim: int, scaled: bool = True) -> None:
        super().__init__()
        self.scale = dim**-0.5 if scaled else 1.0
        self.bias = nn.Parameter(torch.empty(1)) if scaled else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.bias is not None:
            nn.init.constant_(self.bias, -4.595)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """x [B, Q, D], text [B, L, D], text_mask [B, L] -> logits [B, Q, L], fp32"""
        logits = (x @ text.transpose(1, 2)).float() * self.scale
        if self.bias is not None:
            logits = logits + self.bias
        return logits.masked_fill(~text_mask[:, None], float("-inf"))


class LinearHead(nn.Module):
    """Logits of a closed set of classes: a linear layer, -inf on classes that aren't asked for.

    Called as `ContrastiveHead` is; the tokens of a `ClassVocabulary` are classes. The biases start
    at the same prior probability of 0.01.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.linear.reset_parameters()
        nn.init.constant_(self.linear.bias, -4.595)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """x [B, Q, D], text_mask [B, C] -> logits [B, Q, C], fp32; `text` tells nothing"""
        logits = self.linear(x).float()
        if logits.shape[-1] != text_mask.shape[1]:
            raise ValueError(
                f"the class head has {logits.shape[-1]} classes, the vocabulary "
                f"{text_mask.shape[1]}: set num_classes of both class heads and of the denoising"
            )
        return logits.masked_fill(~text_mask[:, None], float("-inf"))


class BoxHead(nn.Module):
    """Three-layer perceptron that refines reference boxes in logit space."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The last layer starts at zero: boxes start as their references."""
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, reference: Tensor) -> Tensor:
        """x [B, Q, D], reference [B, Q, 4] in (0, 1) -> refined boxes [B, Q, 4], fp32"""
        return (self.layers(x).float() + inverse_sigmoid(reference)).sigmoid()


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) of values clamped to [eps, 1 - eps]"""
    return torch.logit(x.float(), eps=eps)
