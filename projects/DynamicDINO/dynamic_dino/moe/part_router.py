"""`PartRouter`: Dynamic-DINO's fine-grained experts, chosen part by part."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .routers import Router
from .routing import Routing


class PartRouter(Router):
    """A token takes, for each of the k parts that an FFN is cut into, that part of one of its N
    copies: the parts of its experts always make up a whole FFN. Not in any of the papers.

    The k best of all experts (`SoftmaxRouter`) may come from different copies and be the same part;
    trained, they mostly are (benchmarks/ABLATIONS.md), and half of the FFN is missing then. Here
    N^k combinations remain. Gates are 1; their gradient is that of log p, with p the softmax over
    the copies of a part, so that the task teaches the router even where only one expert is active.

    Args:
        num_experts: E = k N, expert e is part e % k of copy e // k.
        parts: k. Their rows start equal within a copy, so that all come from one copy then.
        std: standard deviation of the rows at the start. Small ones learn most here, where the
            task teaches them (benchmarks/ABLATIONS.md); `SoftmaxRouter` wants large ones.

    Raises:
        ValueError: k doesn't divide E.
    """

    def __init__(self, dim: int, num_experts: int = 16, parts: int = 2, std: float = 0.02) -> None:
        super().__init__()
        if parts < 1 or num_experts % parts:
            raise ValueError(f"num_experts={num_experts} is not a multiple of parts={parts}")
        self.num_experts, self.top_k, self.parts, self.std = num_experts, parts, parts, std
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            rows = torch.empty_like(self.weight[:: self.parts]).normal_(0, self.std)
            self.weight.copy_(rows.repeat_interleave(self.parts, 0))

    def forward(self, tokens: Tensor, scene: Tensor | None = None) -> Routing:
        """tokens [B, N, D] -> Routing of T = B * N tokens, slot j for part j. In float32, outside
        autocast; the first of equally probable copies is taken."""
        with torch.autocast(tokens.device.type, enabled=False):
            logits = tokens.flatten(0, 1).float() @ self.weight.float().T
            allowed, masked = logits, self.masked(logits.device)
            if masked is not None:
                allowed = logits.masked_fill(masked, torch.finfo(logits.dtype).min)
            p = allowed.unflatten(1, (-1, self.parts)).softmax(1)  # [T, copies, parts]
            copy = p.detach().argmax(1, keepdim=True)
            best = p.gather(1, copy).squeeze(1)
            part = torch.arange(self.parts, device=logits.device)
            ids = copy.squeeze(1) * self.parts + part
            gates = best / best.detach()
            if masked is not None:  # of this part there may be no copy left
                empty = masked[ids]
                ids, gates = ids.masked_fill(empty, -1), gates.masked_fill(empty, 0)
            return Routing(ids.int(), gates, logits.softmax(-1))
