"""`MoEFeedForward`: an FFN of fine-grained experts. Loading a dense FFN into it converts it."""

from __future__ import annotations

from torch import Tensor, nn

from .experts import Experts
from .routers import SoftmaxRouter
from .routing import Routing
from .tuning import split_ffn

DENSE_NAMES = ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")


class MoEFeedForward(nn.Module):
    """Takes the place of a `FeedForward(dim, hidden)`; k experts cost what the dense FFN costs.

    "xE-TopK" of the paper's Table 8 has E = `num_experts` experts of hidden / k units each, that
    is, E / k copies of the FFN, each cut into k parts. MoE-Tuning is loading: `load_state_dict`
    with a dense FFN's keys (linear1, linear2) under this module's prefix initialises the experts
    from it (Algorithm 1) and keeps the router as it was drawn; MoE keys load unchanged.

    Args:
        init_experts: False ignores the dense FFN's weights and keeps random experts, and
        init_router: False draws every router row by itself (both: Table 10).
        backend, recompute: see `Experts`.

    Raises:
        ValueError: k doesn't divide `hidden` or `num_experts`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int = 16,
        top_k: int = 2,
        gate: str = "straight_through",
        activation: str = "relu",
        init_experts: bool = True,
        init_router: bool = True,
        router_std: float = 0.02,
        backend: str = "auto",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if top_k < 1 or hidden % top_k:
            raise ValueError(
                f"top_k={top_k} doesn't divide the FFN's hidden size {hidden}: choose a top_k "
                "that does, e.g. 1, 2 or 4"
            )
        if num_experts % top_k:
            raise ValueError(
                f"num_experts={num_experts} is not a multiple of top_k={top_k}: experts are "
                "whole copies of the FFN, each cut into top_k parts"
            )
        self.hidden, self.num_experts, self.top_k = hidden, num_experts, top_k
        self.init_experts = init_experts
        groups = num_experts // top_k if init_router else None
        self.router = SoftmaxRouter(dim, num_experts, top_k, gate, groups, router_std)
        self.experts = Experts(dim, hidden // top_k, num_experts, activation, backend, recompute)
        self.register_load_state_dict_pre_hook(convert_dense_ffn)

    def forward(
        self, x: Tensor, scene: Tensor | None = None, norm: nn.LayerNorm | None = None
    ) -> tuple[Tensor, Routing]:
        """x [B, N, D], scene [B, D] or None -> (y [B, N, D], Routing of B * N tokens); with a norm,
        norm(x + y) instead of y, which the kernels do in one pass."""
        routing = self.router(x, scene)
        return self.experts(x.flatten(0, 1), routing, norm).view_as(x), routing


def convert_dense_ffn(
    module: MoEFeedForward, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """Load-state-dict pre-hook: replaces a dense FFN's entries by the experts made of it."""
    if not all(prefix + name in state_dict for name in DENSE_NAMES):
        return
    dense = [state_dict.pop(prefix + name) for name in DENSE_NAMES]
    if dense[0].shape[0] != module.hidden:
        raise ValueError(
            f"{prefix}linear1.weight has {dense[0].shape[0]} hidden units, this model's FFN "
            f"{module.hidden}: the checkpoint is of another architecture"
        )
    if module.init_experts:
        experts = split_ffn(*dense, module.top_k, module.num_experts // module.top_k)
    else:
        experts = [p.detach().clone() for p in module.experts.parameters()]
    for name, value in zip(("w1", "b1", "w2", "b2"), experts, strict=True):
        state_dict[f"{prefix}experts.{name}"] = value
    state_dict[prefix + "router.weight"] = module.router.weight.detach().clone()
