"""After MoE-Tuning: fewer copies of the dense FFN, or a single one again.

Dynamic-DINO's conclusion names this as future work: to train with experts, and to consolidate them
for inference. A mixture of kN experts is N copies of an FFN, each cut into k parts (expert e is
part e % k of copy e // k); here copies are averaged part by part, or left out.

    merge   the two copies are averaged whose merging moves weights least, Ward's criterion with
            loads as masses, m_i m_j / (m_i + m_j) |w_i - w_j|^2, until few enough are left (Ward,
            "Hierarchical grouping to optimize an objective function", 1963). Copies that stayed
            alike, and those that no token takes, are the first.
    prune   the copies with the largest load stay as they are.
    dense   the average of all, weighted by load, as one FFN.

Rows of the router are averaged, and left out, with their copies.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layer import MoEFeedForward
from .part_router import PartRouter
from .routers import SoftmaxRouter

METHODS = ("merge", "prune")


def compress(
    model: nn.Module,
    loads: list[Tensor] | None = None,
    copies: int | None = None,
    method: str = "merge",
) -> dict[str, Tensor]:
    """The state dict of `model` with fewer copies in each of its mixtures.

    Args:
        loads: per mixture, in the order of the model's modules, the share [E] of the tokens' slots
            that each expert took (`RoutingStatistics.summary`); None: all the same.
        copies: how many stay, for a model with ``router.num_experts`` of k times that; None: one
            dense FFN each, for the model that was tuned.

    Raises:
        ValueError: the model has no mixture; loads of another number of mixtures or experts; a
            number of copies that is out of range; a router whose experts can't be left out, unless
            the FFN becomes dense; an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: choose one of {', '.join(METHODS)}")
    mixtures = {n: m for n, m in model.named_modules() if isinstance(m, MoEFeedForward)}
    if not mixtures:
        raise ValueError("the model has no mixture of experts to compress")
    if loads is None:
        loads = [torch.ones(m.router.num_experts) for m in mixtures.values()]
    if len(loads) != len(mixtures):
        raise ValueError(f"loads of {len(loads)} mixtures for a model with {len(mixtures)}")
    state = dict(model.state_dict())
    for (name, mixture), load in zip(mixtures.items(), loads, strict=True):
        found = Copies(mixture, load, name)
        new = found.dense() if copies is None else found.kept(copies, method)
        for key in [key for key in state if key.startswith(f"{name}.")]:
            del state[key]
        state.update({f"{name}.{key}": value for key, value in new.items()})
    return state


class Copies:
    """A mixture taken apart: weights [N, k, ...] and loads [N, k] by copy and part."""

    def __init__(self, mixture: MoEFeedForward, load: Tensor, name: str) -> None:
        router, k = mixture.router, mixture.parts
        experts = router.num_experts
        if load.shape != (experts,) or not (load >= 0).all():
            raise ValueError(f"{name}: loads {list(load.shape)} of {experts} experts")
        self.name, self.k, self.router = name, k, router
        self.experts = {
            key: value.detach().view(experts // k, k, *value.shape[1:])
            for key, value in mixture.experts.named_parameters()
        }
        load = load.to(next(iter(self.experts.values())))
        self.load = load.view(experts // k, k)

    def dense(self) -> dict[str, Tensor]:
        """linear1, linear2 of the FFN whose parts are the means of the copies'."""
        mass = torch.where(self.load.sum(0) > 0, self.load, 1.0)  # of a part that nobody takes
        mean = {key: averaged(value, mass) for key, value in self.experts.items()}
        return {
            "linear1.weight": mean["w1"].flatten(0, 1),
            "linear1.bias": mean["b1"].flatten(),
            "linear2.weight": mean["w2"].transpose(0, 1).flatten(1),
            "linear2.bias": mean["b2"].sum(0),
        }

    def kept(self, count: int, method: str) -> dict[str, Tensor]:
        """The entries of a mixture of `count` copies."""
        total = len(self.load)
        if not 1 <= count <= total:
            raise ValueError(f"copies={count}: choose 1 to {total}, which {self.name} has")
        if not isinstance(self.router, SoftmaxRouter | PartRouter):
            raise ValueError(
                f"experts of {type(self.router).__name__} ({self.name}) can't be left out: leave "
                "out copies, for dense FFNs"
            )
        rows = self.router.weight.detach().view(total, self.k, -1)
        values = {"router.weight": rows}
        values |= {f"experts.{key}": value for key, value in self.experts.items()}
        if method == "prune":
            best = self.load.sum(1).argsort(descending=True, stable=True)[:count].sort().values
            values = {key: value[best] for key, value in values.items()}
        else:
            values = self._merged(values, count)
        return {key: value.flatten(0, 1) for key, value in values.items()}

    def _merged(self, values: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        mass, values = self.load.sum(1), dict(values)
        while len(mass) > count:
            flat = torch.cat(
                [v.flatten(1) for key, v in values.items() if key.startswith("experts.")], 1
            )
            both = mass[:, None] + mass
            cost = mass[:, None] * mass / both.clamp(min=1e-12) * torch.cdist(flat, flat) ** 2
            cost = cost.masked_fill(torch.ones_like(cost, dtype=torch.bool).tril(), torch.inf)
            i, j = divmod(int(cost.argmin()), len(mass))
            pair = mass[[i, j]] if mass[[i, j]].sum() > 0 else torch.ones_like(mass[:2])
            stay = [n for n in range(len(mass)) if n != j]
            for key, value in values.items():
                value = value.clone()
                value[i] = averaged(value[[i, j]], pair)
                values[key] = value[stay]
            mass = mass.clone()
            mass[i] += mass[j]
            mass = mass[stay]
        return values


def averaged(values: Tensor, mass: Tensor) -> Tensor:
    """The mean over the first dimension of values [N, ...], weighted by mass [N] or [N, k]."""
    mass = (mass / mass.sum(0)).view(*mass.shape, *[1] * (values.dim() - mass.dim()))
    return (values * mass).sum(0)
