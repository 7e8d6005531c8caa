"""`Routing`: what a router decided, the one value that losses, statistics and analysis read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Routing:
    """Which experts each token uses. T tokens, K slots, E experts.

    expert_ids  int32 [T, K], -1 marks an empty slot
    gates       float [T, K], weight of each slot, 0 where empty
    probs       float [T, E], the router's softmax distribution
    counts      what the router's kernel counted for that of the experts, see `expert_ffn`; None
                where it didn't, or where these are no longer the router's tokens
    """

    expert_ids: Tensor
    gates: Tensor
    probs: Tensor
    counts: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.probs.shape[-1]

    @classmethod
    def cat(cls, routings: Sequence[Routing]) -> Routing:
        """The tokens of several forward passes through one layer, in order."""
        return cls(
            torch.cat([r.expert_ids for r in routings]),
            torch.cat([r.gates for r in routings]),
            torch.cat([r.probs for r in routings]),
        )

    def slice_tokens(self, batch: int, start: int) -> Routing:
        """Drops the first `start` tokens of each of `batch` images, e.g. denoising queries."""
        keep = [
            t.unflatten(0, (batch, -1))[:, start:].flatten(0, 1)
            for t in (self.expert_ids, self.gates, self.probs)
        ]
        return Routing(*keep)
