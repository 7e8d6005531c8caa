"""`TopAnyRouter`: DynMoE's router, which lets every token have as many experts as it takes."""

from __future__ import annotations

import torch
from dynamic_dino_kernels.moe import route_any
from torch import Tensor, nn

from .routers import Router
from .routing import Routing


class TopAnyRouter(Router):
    """Expert e is chosen if sigmoid(cos(x, w_e)) > sigmoid(G_e), and the k chosen ones are averaged
    (DynMoE, arXiv 2405.14297, equations 3 to 6).

    The gates 1 / k pass their gradient straight through to the cosine and to the threshold G_e,
    which is learned. In training a token may choose nobody: the layer then adds nothing to it, and
    its kind is what a new expert is made for (`AdaptiveExperts`). In evaluation it gets the best
    active expert (equation 7).

    All `num_experts` slots exist from the start; `active` says which are experts at present, so
    that experts come and go without a change of shape. R_E and R_S of the paper's Algorithm 1 are
    buffers, `activations` [E] and `unrouted` [D], so that a checkpoint has them.

    Args:
        num_experts: slots, the paper's maximal number of experts.
        initial_experts: how many are active at the start; None: all.
        forced_k: in evaluation every token gets its k best active experts, whatever the thresholds
            say (the paper's Table 3); None: top-any. May be changed at any time.

    Raises:
        ValueError: `initial_experts` or `forced_k` doesn't lie between 1 and `num_experts`.
    """

    active: Tensor
    activations: Tensor
    unrouted: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        initial_experts: int | None = None,
        forced_k: int | None = None,
    ) -> None:
        super().__init__()
        initial_experts = num_experts if initial_experts is None else initial_experts
        for name, value in (("initial_experts", initial_experts), ("forced_k", forced_k)):
            if value is not None and not 1 <= value <= num_experts:
                raise ValueError(f"{name}={value} must lie between 1 and num_experts={num_experts}")
        self.num_experts = self.top_k = num_experts
        self.initial_experts, self.forced_k = initial_experts, forced_k
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.thresholds = nn.Parameter(torch.empty(num_experts))
        self.register_buffer("active", torch.empty(num_experts, dtype=torch.bool))
        self.register_buffer("activations", torch.empty(num_experts, dtype=torch.long))
        self.register_buffer("unrouted", torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthonormal rows, thresholds of zero: about half of the experts are chosen."""
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.thresholds)
        with torch.no_grad():
            self.active.copy_(torch.arange(self.num_experts) < self.initial_experts)
            self.activations.zero_()
            self.unrouted.zero_()

    def forward(self, tokens: Tensor, scene: Tensor | None = None) -> Routing:
        """tokens [B, N, D] -> Routing of T = B * N tokens with E slots each, many of them empty"""
        x = tokens.flatten(0, 1)
        forced = None if self.training else self.forced_k
        limits = self.thresholds if forced is None else torch.full_like(self.thresholds, -torch.inf)
        masked = self.masked(x.device)
        off = ~self.active if masked is None else ~self.active | masked
        limits = limits.masked_fill(off, torch.inf)
        ids, gates, scores, counts = route_any(
            x, self.weight, limits, max_k=forced, fallback=not self.training
        )
        routing = Routing(ids, gates, scores, counts, active=self.active)
        if self.training:
            routing.keys, routing.tokens = self.weight, x.detach()
        return routing
