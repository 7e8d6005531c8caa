"""`MoEFeedForward`: an FFN of experts. Loading a dense FFN into it converts it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .experts import Experts
from .routers import Router, check_copies
from .routing import Routing
from .tuning import split_ffn

DENSE_NAMES = ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")


class MoEFeedForward(nn.Module):
    """Takes the place of a `FeedForward(dim, hidden)`: a router chooses experts for every token.

    The router says how many experts there are, and into how many parts a copy of the FFN is cut:
    by `SoftmaxRouter`, Dynamic-DINO's, into k, so that k experts cost what the dense FFN costs
    ("xE-TopK" of the paper's Table 8: E experts of hidden / k units each, that is, E / k copies of
    the FFN, each cut into k parts); mostly into 1: every expert is a whole copy.

    MoE-Tuning is loading: `load_state_dict` with a dense FFN's keys (linear1, linear2) under this
    module's prefix initialises the experts from it (Algorithm 1) and keeps the router as it was
    drawn; MoE keys load unchanged.

    Args:
        router: how experts are chosen, and how many there are; see `Router`.
        init_experts: False ignores the dense FFN's weights and keeps random experts (Table 10).
        expert_hidden: units of an expert, if not those of its part of the FFN. There is nothing to
            initialise such experts from, so it goes with init_experts=False.
        response_tokens: of how many of its tokens, at most, each expert's mean answer is reported
            in training, for `DiversityLoss`; 0: of none.
        backend, recompute: see `Experts`.

    Raises:
        ValueError: the router's parts don't divide `hidden` or its experts, or `expert_hidden`
            isn't the size of what the experts start as.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        router: Router,
        activation: str = "relu",
        init_experts: bool = True,
        backend: str = "auto",
        recompute: bool = False,
        expert_hidden: int | None = None,
        response_tokens: int = 0,
    ) -> None:
        super().__init__()
        if hidden % router.parts:
            raise ValueError(
                f"top_k={router.top_k} doesn't divide the FFN's hidden size {hidden}: choose a "
                "top_k that does, e.g. 1, 2 or 4"
            )
        check_copies(router.num_experts, router.parts)
        size = hidden // router.parts
        if expert_hidden not in (None, size) and init_experts:
            raise ValueError(
                f"expert_hidden={expert_hidden} is not the size {size} of the dense FFN's parts, "
                "which the experts start as: leave it out, or set init_experts=False to start "
                "from random experts"
            )
        self.hidden, self.parts = hidden, router.parts
        self.init_experts, self.response_tokens = init_experts, response_tokens
        self.router = router
        self.experts = Experts(
            dim, expert_hidden or size, router.num_experts, activation, backend, recompute
        )
        self.register_load_state_dict_pre_hook(convert_dense_ffn)

    def forward(
        self, x: Tensor, scene: Tensor | None = None, norm: nn.LayerNorm | None = None
    ) -> tuple[Tensor, Routing]:
        """x [B, N, D], scene [B, D] or None -> (y [B, N, D], Routing of B * N tokens); with a norm,
        norm(x + y) instead of y, which the kernels do in one pass."""
        tokens = x.flatten(0, 1)
        # In one call where Python is what a detector waits for.
        in_one = x.is_cuda and not torch.is_grad_enabled()
        if in_one and (block := self.router.block()):
            y, routing = self.experts.with_router(tokens, norm, **block)
        else:
            routing = self.router(x, scene)
            y = self.experts(tokens, routing, norm)
        routing.parts = self.parts
        if self.training and self.response_tokens:
            routing.mean_outputs = self.experts.mean_outputs(tokens, routing, self.response_tokens)
        return y.view_as(x), routing


def convert_dense_ffn(
    module: MoEFeedForward, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """Load-state-dict pre-hook: replaces a dense FFN's entries by the experts made of it."""
    if not all(prefix + name in state_dict for name in DENSE_NAMES):
        return
    w1, b1, w2, b2 = (state_dict.pop(prefix + name) for name in DENSE_NAMES)
    if len(w1) != module.hidden:
        raise ValueError(
            f"{prefix}linear1.weight has {len(w1)} hidden units, this model's FFN "
            f"{module.hidden}: the checkpoint is of another architecture"
        )
    experts: tuple[Tensor, ...]
    if module.init_experts:
        copies = module.router.num_experts // module.parts
        experts = split_ffn(w1, b1, w2, b2, module.parts, copies)
    else:
        experts = tuple(p.detach().clone() for p in module.experts.parameters())
    for name, value in zip(("w1", "b1", "w2", "b2"), experts, strict=True):
        state_dict[f"{prefix}experts.{name}"] = value
    for name, value in module.router.state_dict().items():
        state_dict[f"{prefix}router.{name}"] = value.detach().clone()
