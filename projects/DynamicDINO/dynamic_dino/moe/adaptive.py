"""`AdaptiveExperts`: DynMoE's process that removes and adds experts while a model trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .layer import MoEFeedForward
from .losses import expert_counts
from .routing import Routing
from .top_any import TopAnyRouter


@dataclass
class Change:
    """What happened to a layer's experts: slots removed and added, and how many are active now."""

    layer: int
    removed: list[int]
    added: list[int]
    active: int


class AdaptiveExperts:
    """Algorithm 1 of DynMoE (arXiv 2405.14297) for all top-any layers of a model, in any training
    loop: `record` after each step of a window, then `adapt`.

    What is recorded lies in the routers' buffers, summed over all ranks, so that every rank decides
    alike, and that a checkpoint of any rank resumes in the middle of a window.

    Raises:
        ValueError: the model has no `TopAnyRouter`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = top_any_layers(model)
        if not self.layers:
            raise ValueError(
                "adaptive experts need a MoE layer with a TopAnyRouter, and the model has none: "
                "choose that router, or switch adaptive experts off"
            )

    @torch.no_grad()
    def record(self, routings: list[Routing]) -> None:
        """Adds a training step's routings to R_E, how often each expert was chosen, and R_S, the
        sum of the tokens that chose none. Collective where processes train together.

        Args:
            routings: those of all MoE layers, in the order of the model's modules; those of other
                routers are passed over.
        """
        routings = [r for r in routings if r.tokens is not None]
        if len(routings) != len(self.layers):
            raise ValueError(
                f"{len(routings)} layers report tokens to adapt experts to, but the model has "
                f"{len(self.layers)} top-any layers: all of them must be in training mode"
            )
        found = [torch.cat(counts_and_sum(routing)) for routing in routings]
        total = torch.cat(found)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        for layer, part in zip(self.layers, total.split([len(f) for f in found]), strict=True):
            router = router_of(layer)
            activations, unrouted = part.split([router.num_experts, len(router.unrouted)])
            router.activations += activations.long()
            router.unrouted += unrouted.to(router.unrouted.dtype)

    @torch.no_grad()
    def adapt(self, optimizer: torch.optim.Optimizer | None = None) -> list[Change]:
        """Removes experts that no token chose, adds one for the tokens that chose none, and starts
        the records anew. Returns what changed, layer by layer.

        The new expert takes the first free slot, if there is one: w = R_S / ||R_S||, G = 0, and the
        mean of the active experts' weights, which the paper leaves open; `optimizer` forgets what
        it knows of the slot. Where nobody was chosen at all, nobody is removed.
        """
        changes = []
        for i, layer in enumerate(self.layers):
            router = router_of(layer)
            chosen = router.active & (router.activations > 0)
            removed = router.active & ~chosen & chosen.any()
            router.active &= ~removed
            free = (~router.active).nonzero().flatten().tolist()
            added = free[:1] if router.unrouted.any() else []
            for slot in added:
                add_expert(layer, slot, optimizer)
            router.activations.zero_()
            router.unrouted.zero_()
            if added or removed.any():
                gone = removed.nonzero().flatten().tolist()
                changes.append(Change(i, gone, added, int(router.active.sum())))
        return changes

    @torch.no_grad()
    def follow(self, average: nn.Module, changes: list[Change]) -> None:
        """Gives a moving average of the model the same active experts, and the new ones as they
        are: an average of what stood in their slots before would mean nothing."""
        copies = top_any_layers(average)
        for mine, its in zip(copies, self.layers, strict=True):
            for a, b in zip(mine.buffers(), its.buffers(), strict=True):
                a.copy_(b)
        for change in changes:
            pairs = (layers[change.layer].parameters() for layers in (copies, self.layers))
            for a, b in zip(*pairs, strict=True):
                a[change.added] = b[change.added]


def top_any_layers(model: nn.Module) -> list[MoEFeedForward]:
    """The MoE layers that have a `TopAnyRouter`, in the order of the model's modules."""
    layers = (m for m in model.modules() if isinstance(m, MoEFeedForward))
    return [layer for layer in layers if isinstance(layer.router, TopAnyRouter)]


def router_of(layer: MoEFeedForward) -> TopAnyRouter:
    """The router of one of `top_any_layers`."""
    assert isinstance(layer.router, TopAnyRouter)
    return layer.router


def counts_and_sum(routing: Routing) -> tuple[Tensor, Tensor]:
    """R_E [E] and R_S [D] of one forward pass, in float64, which counts exactly and which sums
    the same whatever the number of ranks to well within float32"""
    assert routing.tokens is not None  # in training mode, `record` says
    none = (routing.expert_ids < 0).all(1).double()
    counts = expert_counts(routing.expert_ids, routing.num_experts)
    return counts.double(), none @ routing.tokens.double()


def add_expert(
    layer: MoEFeedForward, slot: int, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Fills and activates a slot of a top-any layer; see `AdaptiveExperts.adapt`."""
    router = router_of(layer)
    for stacked in layer.experts.parameters():
        stacked[slot] = stacked[router.active].mean(0)
    router.weight[slot] = router.unrouted / router.unrouted.norm()
    router.thresholds[slot] = 0
    router.active[slot] = True
    states = optimizer.state if optimizer else {}
    for parameter in layer.parameters():
        for state in states.get(parameter, {}).values():
            if isinstance(state, Tensor) and state.shape == parameter.shape:
                state[slot] = 0
