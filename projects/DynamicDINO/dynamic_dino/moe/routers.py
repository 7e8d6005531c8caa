"""Routers: which experts a token goes to, and with which weight."""

from __future__ import annotations

import torch
from dynamic_dino_kernels.moe import route
from dynamic_dino_kernels.moe.reference import best_first
from torch import Tensor, nn

from .routing import Routing

GATES = ("indicator", "renormalized", "straight_through")


class Router(nn.Module):
    """What `MoEFeedForward` asks of a router, see docs/moe.md for one of your own.

    Attributes:
        num_experts: E, how many experts there are.
        top_k: the most experts that a token can get.
        parts: how many parts each copy of the dense FFN is cut into, one expert each; 1 where
            experts are whole copies.
        dropped: experts that no token gets, see `drop`.
    """

    num_experts: int
    top_k: int
    parts: int = 1
    dropped: tuple[int, ...] = ()

    def drop(self, *experts: int) -> None:
        """No token gets these experts from now on, but its next best ones, to see what they are
        good for; without arguments, all are back. Not part of checkpoints."""
        self.dropped = experts

    def masked(self, device: torch.device) -> Tensor | None:
        """bool [E], True for the experts that are dropped; None where none is."""
        if not self.dropped:
            return None
        mask = torch.zeros(self.num_experts, dtype=torch.bool, device=device)
        for expert in self.dropped:  # a list as an index, or a value, is copied from the host
            mask[expert].fill_(True)
        return mask

    def block(self) -> dict | None:
        """Arguments of `dynamic_dino_kernels.moe_block`, "router" and others, with which it routes
        as `forward` does without gradient, in one call with the experts; None: it can't."""
        return None

    def forward(self, tokens: Tensor, scene: Tensor | None = None) -> Routing:
        """tokens [B, N, D], scene [B, D] -> Routing of T = B * N tokens"""
        raise NotImplementedError


class SoftmaxRouter(Router):
    """Dynamic-DINO's router: p = softmax(W x), the k most probable experts (paper, section 3.2).

    The gates of the chosen experts, all equal to one while the rows of siblings are equal, so that
    a converted model starts as the dense one:

    - ``indicator``: 1, as the paper writes it. No gradient of the detection loss reaches the
      router, and sibling rows never part: experts work as the copies that they are parts of.
    - ``renormalized``: the softmax over the k chosen logits, times k.
    - ``straight_through``: 1 in the forward pass, the gradient of ``renormalized`` backward.

    With the latter two siblings can part, and a token may take the same part of two copies and lack
    another: rarely where rows are drawn with N(0, 1), mostly where they start small
    (benchmarks/ABLATIONS.md). `PartRouter` learns from the detection loss without that.

    Args:
        num_experts, top_k: E and k, the "xE-TopK" of the paper's Table 8: E / k copies of the dense
            FFN, each cut into k parts.
        tied: a row is drawn for each copy, and repeated for its parts (Algorithm 1). False draws
            every row by itself (Table 10, without initialisation).
        std: standard deviation of the rows, as in Algorithm 1. Which experts are chosen doesn't
            depend on it; the smaller the rows, the faster an optimizer turns them, and copies
            that are fed other tokens all the time stay alike.

    Raises:
        ValueError: an unknown gate, or a k that is out of range or, if tied, doesn't divide E.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int = 16,
        top_k: int = 2,
        gate: str = "indicator",
        tied: bool = True,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        if gate not in GATES:
            raise ValueError(f"gate {gate!r}: choose one of {', '.join(GATES)}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must lie between 1 and num_experts={num_experts}")
        if tied:
            check_copies(num_experts, top_k)
        self.num_experts, self.top_k, self.parts = num_experts, top_k, top_k
        self.gate, self.tied, self.std = gate, tied, std
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        repeats = self.parts if self.tied else 1
        with torch.no_grad():
            rows = torch.empty_like(self.weight[::repeats]).normal_(0, self.std)
            self.weight.copy_(rows.repeat_interleave(repeats, 0))

    def block(self) -> dict | None:
        if self.dropped:
            return None
        weighted = self.gate == "renormalized"
        return dict(router=self.weight, top_k=self.top_k, weighted=weighted)

    def forward(self, tokens: Tensor, scene: Tensor | None = None) -> Routing:
        """tokens [B, N, D] -> Routing of T = B * N tokens; `scene` is for scene-aware routers."""
        x = tokens.flatten(0, 1)
        ids, soft, probs, blocks = route(x, self.weight, self.top_k)
        assert soft is not None  # which only `moe_block` may leave out
        masked = self.masked(x.device)
        if masked is not None:  # not what the kernel is for, and in no hurry
            logits = (x.double() @ self.weight.double().T).float()
            ids, soft = best_experts(logits, self.top_k, masked)
            soft, blocks = soft * self.top_k, None
        gates: Tensor | None = None
        if self.gate == "renormalized":
            gates = soft
        elif self.gate == "straight_through" and soft.requires_grad:
            gates = torch.ones_like(soft) + (soft - soft.detach())
        if masked is not None and gates is not None:
            gates = gates.masked_fill(ids < 0, 0)
        return Routing(ids, gates, probs, blocks)


def check_copies(num_experts: int, parts: int) -> None:
    """Raises ValueError unless the experts are whole copies of an FFN, cut into `parts` each."""
    if num_experts % parts:
        raise ValueError(
            f"num_experts={num_experts} is not a multiple of top_k={parts}: experts are whole "
            "copies of the FFN, each cut into top_k parts"
        )


def best_experts(logits: Tensor, top_k: int, masked: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k best experts of each token that aren't masked, ids int32 [T, K], and the softmax over
    them [T, K]. Where there are fewer, slots are empty: -1 and 0.

    Args:
        logits: [T, E]
        masked: bool [E] or [T, E]
    """
    if masked is not None:
        logits = logits.masked_fill(masked, -torch.inf)
    ids = best_first(logits)[:, :top_k]
    best = logits.gather(1, ids)
    empty = best == -torch.inf
    return ids.masked_fill(empty, -1).int(), best.softmax(-1).masked_fill(empty, 0)
