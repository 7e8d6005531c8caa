"""The FFN of the decoder, dense and as experts of several libraries, for `moe_layer.py`.

All compute the same: k experts of hidden / k units each, with biases and ReLU, weighted by gates,
which is the arithmetic of the dense FFN. A library without biases has them added apart.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from dynamic_dino_kernels import expert_ffn
from dynamic_dino_kernels.backend import obstacle_of
from torch import Tensor, nn


class Dense(nn.Module):
    """Linear, ReLU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        return self.linear2(F.relu(self.linear1(x)))


class Experts(nn.Module):
    """Ours, run by one back-end. The others keep the same parameters."""

    backend = "auto"

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(experts, hidden, dim) * dim**-0.5)
        self.b1 = nn.Parameter(torch.randn(experts, hidden))
        self.w2 = nn.Parameter(torch.randn(experts, dim, hidden) * hidden**-0.5)
        self.b2 = nn.Parameter(torch.randn(experts, dim))

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor, **fused) -> Tensor:
        weights = (self.w1, self.b1, self.w2, self.b2)
        return expert_ffn(x, *weights, ids, gates, backend=self.backend, **fused)


class Sequential(Experts):
    backend = "sequential"


class Grouped(Experts):
    backend = "grouped"


class Triton(Experts):
    backend = "triton"


class TorchGroupedMM(Experts):
    """torch.nn.functional.grouped_mm: tokens sorted, two products, biases apart."""

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        flat = ids.flatten().long()
        order = flat.argsort(stable=True)
        owner = flat[order]
        ends = F.one_hot(flat, len(self.w1)).sum(0).cumsum(0).int()
        rows = x[order // ids.shape[1]]
        hidden = F.relu(F.grouped_mm(rows, self.w1.transpose(1, 2), offs=ends) + self.b1[owner])
        rows = F.grouped_mm(hidden, self.w2.transpose(1, 2), offs=ends) + self.b2[owner]
        rows = torch.empty_like(rows).index_copy(0, order, rows)
        return (rows.unflatten(0, ids.shape) * gates.unsqueeze(-1).to(x.dtype)).sum(1)


class _HuggingFace(Experts):
    """The experts of Hugging Face transformers, which read these attributes of their module."""

    has_gate = is_transposed = has_post_expert_norm = _is_expert_parallel = False
    has_bias = True
    up_proj = property(lambda self: self.w1)
    up_proj_bias = property(lambda self: self.b1)
    down_proj = property(lambda self: self.w2)
    down_proj_bias = property(lambda self: self.b2)
    num_experts = property(lambda self: len(self.w1))
    function = ""

    @staticmethod
    def act_fn(x: Tensor) -> Tensor:
        return F.relu(x)

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        from transformers.integrations import moe

        return getattr(moe, self.function)(self, x, ids.long(), gates.to(x.dtype))


class HuggingFaceGroupedMM(_HuggingFace):
    function = "grouped_mm_experts_forward"


class HuggingFaceBatchedMM(_HuggingFace):
    """Copies the weights for every slot: for few tokens."""

    function = "batched_mm_experts_forward"


class MoEOps(Experts):
    """The package moe-ops (PyPI): counting sort and grouped GEMM in Triton, biases apart."""

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        from moe_ops import grouped_gemm, permute, unpermute

        rows, places, offsets = permute(x, ids, E=len(self.w1))
        ends = offsets[1:].contiguous()
        numbers = torch.arange(len(rows), device=x.device)
        owner = torch.searchsorted(ends, numbers, right=True)
        hidden = F.relu(grouped_gemm(rows, self.w1, offsets, trans_b=True) + self.b1[owner])
        rows = grouped_gemm(hidden, self.w2, offsets, trans_b=True) + self.b2[owner]
        return unpermute(rows, places, gates, *ids.shape)


def contenders(device: str, dtype: torch.dtype, tokens: int) -> dict[str, Callable[..., nn.Module]]:
    """Name -> class of everything that runs here; built as Dense(dim, hidden), and the others as
    Experts(dim, hidden / k, experts)."""
    result = {"dense": Dense, "sequential": Sequential, "grouped": Grouped}
    if not obstacle_of(torch.device(device)):
        result["triton"] = Triton
    # Elsewhere and for other types grouped_mm is itself a loop.
    if device == "cpu" or dtype == torch.bfloat16:
        result["torch grouped_mm"] = TorchGroupedMM
        if find_spec("transformers"):
            result["HF grouped_mm"] = HuggingFaceGroupedMM
    if find_spec("transformers") and device == "cuda" and tokens <= 900:
        result["HF batched_mm"] = HuggingFaceBatchedMM
    if find_spec("moe_ops") and device == "cuda" and dtype.itemsize == 2:
        result["moe-ops"] = MoEOps
    return result
