"""The FFN of the decoder, dense and as experts of several libraries, for `moe_layer.py`.

All compute the same: k experts of hidden / k units each, with biases and ReLU, weighted by gates,
which is the arithmetic of the dense FFN. A library without biases has them added apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from dynamic_dino.moe.hierarchical import HierarchicalRouter
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.routers import Router, SoftmaxRouter
from dynamic_dino.moe.top_any import TopAnyRouter
from dynamic_dino_kernels import expert_ffn
from dynamic_dino_kernels.backend import obstacle_of
from torch import Tensor, nn
from torch.profiler import record_function

from lib.phases import ROUTING


class Dense(nn.Module):
    """Linear, ReLU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        return self.linear2(F.relu(self.linear1(x)))


class BenchedExperts(nn.Module):
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


class Sequential(BenchedExperts):
    """The simplest loop: it selects each expert's tokens, and waits every time for their number."""

    backend = "sequential"


@dataclass(frozen=True)
class Room:
    """Rows of each expert's chunk, fixed beforehand, as capacities are.

    sizes   list of E numbers of rows
    limit   int64 [E], the same on the device
    before  int64 [E], the row before each chunk
    number  int32 [E], 0 to E - 1
    rows    int64 [], all of them
    """

    sizes: list[int]
    limit: Tensor
    before: Tensor
    number: Tensor
    rows: Tensor

    @classmethod
    def for_routing(cls, ids: Tensor, experts: int, step: int = 16) -> Room:
        """Enough for these ids int [T, K]: every expert's load, rounded up, and one step at least.
        Waits for the device. Rounding leaves some room for tokens that rounding of another kind
        sends elsewhere in the next call; matrix units pad to as many rows in any case."""
        loads = torch.bincount(ids.flatten().clamp(min=-1) + 1, minlength=experts + 1)[1:]
        sizes = (loads + step - 1).div(step, rounding_mode="floor").clamp(min=1) * step
        number = torch.arange(experts, device=ids.device, dtype=torch.int32)
        return cls(sizes.tolist(), sizes, sizes.cumsum(0) - sizes - 1, number, sizes.sum())


def looped_ffn(x, w1, b1, w2, b2, ids, gates: Tensor | None, room: Room) -> Tensor:
    """The paper's baseline as fast as a Python loop over experts can be: nothing waits for the
    device, so that the loop costs launches alone. For comparison only.

    MoE-LLaVA, whose experts are DeepSpeed's, is written like this: tokens are dispatched to one
    chunk of fixed capacity per expert, a Python loop runs every expert on its chunk, the outputs
    are concatenated and combined with the gates. Wherever there is a choice, the loop gets the
    faster one, so that what beats it beats theirs:
    - A capacity of its own for every expert, known from the same inputs (`Room`). Nothing is
      dropped, so the result is exact, and next to no row is padding. One capacity for all would be
      the largest load; theirs is twice to four times the mean in evaluation, and drops the rest.
      What exceeds the room is dropped here, too.
    - Tokens are moved by index. DeepSpeed's default multiplies with a one-hot [T, E, C], twice,
      which at T = 900 costs about as much as the experts.
    - Every expert runs, as theirs do, if on no more than 16 rows of padding.
    """
    hits = ids.flatten()[:, None] == room.number
    rank = hits.cumsum(0)  # from 1, among the slots of the same expert
    place = torch.where(hits & (rank <= room.limit), rank + room.before, room.rows).amin(1)
    # Slots without a place share the row after the chunks; the last row stays zero.
    rows = sum(room.sizes)
    chunks = x.new_zeros(rows + 2, x.shape[1])
    slots = x[:, None].expand(-1, ids.shape[1], -1).reshape(len(place), -1)
    chunks = chunks.index_copy(0, place, slots)
    outputs = []
    experts = zip(w1.unbind(), b1.unbind(), w2.unbind(), b2.unbind(), strict=True)
    parts = chunks[:rows].split(room.sizes)
    for chunk, (w1_e, b1_e, w2_e, b2_e) in zip(parts, experts, strict=True):
        outputs.append(F.linear(F.relu(F.linear(chunk, w1_e, b1_e)), w2_e, b2_e))
    y = torch.cat((*outputs, chunks[rows + 1 :])).index_select(0, place).unflatten(0, ids.shape)
    return (y if gates is None else y * gates.to(y.dtype)[..., None]).sum(1)


class Loop(BenchedExperts):
    """`looped_ffn`. The first call decides on the room, and waits; later ones don't."""

    room: Room | None = None

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor | None) -> Tensor:
        if self.room is None:
            self.room = Room.for_routing(ids, len(self.w1))
        return looped_ffn(x, self.w1, self.b1, self.w2, self.b2, ids, gates, self.room)


class Grouped(BenchedExperts):
    backend = "grouped"


class Triton(BenchedExperts):
    backend = "triton"


class TorchGroupedMM(BenchedExperts):
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


class _HuggingFace(BenchedExperts):
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


class MoEOps(BenchedExperts):
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


class RoutedLayer(nn.Module):
    """The end of a decoder layer with a router of the project: router, experts, residual, norm.

    Unlike the candidates above these don't compute the same: whole copies of the FFN, of which a
    token takes two or more, cost as many FFNs.
    """

    def __init__(self, dim: int, hidden: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.ffn = MoEFeedForward(dim, hidden, self.router(dim, experts, top_k))
        self.norm = nn.LayerNorm(dim)

    @staticmethod
    def router(dim: int, experts: int, top_k: int) -> Router:
        return SoftmaxRouter(dim, experts, top_k)

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        with record_function(ROUTING):
            routing = self.ffn.router(x[None], x.mean(0, keepdim=True))
        return self.ffn.experts(x, routing, self.norm)

    @torch.no_grad()
    def operations(self, x: Tensor) -> float:
        """Multiply-adds of router and experts, over those of the dense FFN."""
        ids = self.ffn.router(x[None], x.mean(0, keepdim=True)).expert_ids
        slots = int((ids >= 0).sum()) / self.ffn.parts
        rows = sum(p.numel() for p in self.ffn.router.parameters() if p.dim() == 2)
        return (slots + len(x) * rows / (2 * x.shape[1] * self.ffn.hidden)) / len(x)


class HiMoELayer(RoutedLayer):
    """A scene router, then k whole experts for each token."""

    @staticmethod
    def router(dim: int, experts: int, top_k: int) -> Router:
        return HierarchicalRouter(dim, experts, top_k)


class DynMoELayer(RoutedLayer):
    """As many whole experts as exceed their thresholds; as it starts, with 6 of 8 experts."""

    @staticmethod
    def router(dim: int, experts: int, top_k: int) -> Router:
        return TopAnyRouter(dim, num_experts=8, initial_experts=6)


ROUTERS = {
    "dense": Dense,
    "Dynamic-DINO": RoutedLayer,
    "HI-MoE": HiMoELayer,
    "DynMoE": DynMoELayer,
}


def candidates(device: str, dtype: torch.dtype, tokens: int) -> dict[str, Callable[..., nn.Module]]:
    """Name -> class of everything that runs here; built as Dense(dim, hidden), and the others as
    BenchedExperts(dim, hidden / k, experts)."""
    result = {"dense": Dense, "loop": Loop, "sequential": Sequential, "grouped": Grouped}
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
