"""Experts as plain operators of static shapes: the same outputs as `MoEFeedForward`'s.

A `StaticRouter` gives every token slots, experts and their weights; a `StaticExperts` has one of
three ways to compute what they say:

sparse  each expert computes its tokens; its number of rows depends on the data (ONNX: NonZero)
tiles   slots sorted into tiles of rows of one expert, whose weights are gathered: static shapes
all     every expert computes every token, and its gate, mostly 0, weighs the result
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from dynamic_dino_kernels.moe.activations import activate
from torch import Tensor, nn

from ..moe.hierarchical import HierarchicalRouter
from ..moe.layer import MoEFeedForward
from ..moe.part_router import PartRouter
from ..moe.routers import Router, SoftmaxRouter
from ..moe.top_any import TopAnyRouter

EXPERTS = ("sparse", "tiles", "all")
TILE = 32  # rows

Slots = tuple[Tensor, Tensor]  # experts int64 [T, K], weights float [T, K]


class StaticMoE(nn.Module):
    """In the place of a `MoEFeedForward`, for inference. Siblings whose rows of the router are
    equal, as the indicator gate leaves them, become one expert: they are always chosen together,
    and no runtime has a tie to break.

    Raises:
        ValueError: the router is none of this package's, or has experts dropped.
    """

    def __init__(self, layer: MoEFeedForward, experts: str) -> None:
        super().__init__()
        router, own = layer.router, layer.experts
        weights = tuple(p.detach() for p in (own.w1, own.b1, own.w2, own.b2))
        if router.dropped:
            raise ValueError(
                f"experts {router.dropped} of a layer are dropped, which is for looking at a model:"
                " call router.drop() before the export"
            )
        if isinstance(router, TopAnyRouter):
            weights = tuple(w[router.active] for w in weights)
        k = router.parts
        if isinstance(router, SoftmaxRouter) and siblings_are_equal(router.weight, k):
            weights = merge_siblings(*weights, k)
            self.router: nn.Module = StaticSoftmax(router.weight[::k], 1, False)
        else:
            self.router = static_router(router)
        self.experts = _FORMS[experts](*weights, own.activation)

    def forward(
        self, x: Tensor, scene: Tensor | None = None, norm: nn.LayerNorm | None = None
    ) -> tuple[Tensor, None]:
        """x [B, N, D], scene [B, D] -> (y [B, N, D], None), or norm(x + y) if a norm is given"""
        y = self.experts(x.flatten(0, 1), *self.router(x, scene)).view_as(x)
        return (y if norm is None else norm(x + y)), None


def siblings_are_equal(rows: Tensor, k: int) -> bool:
    """Whether the k rows of each copy are bitwise equal: [E, D] -> bool"""
    copies = rows.detach().unflatten(0, (-1, k))
    return torch.equal(copies, copies[:, :1].expand_as(copies))


def merge_siblings(
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each k experts, one after the other, as one of k times as many units with the same output."""
    w1, b1 = w1.unflatten(0, (-1, k)).flatten(1, 2), b1.unflatten(0, (-1, k)).flatten(1, 2)
    w2 = w2.unflatten(0, (-1, k)).transpose(1, 2).flatten(2)
    return w1, b1, w2, b2.unflatten(0, (-1, k)).sum(1)


# Routers -----------------------------------------------------------------------------------------


def static_router(router: Router) -> nn.Module:
    """x [B, N, D], scene [B, D] -> `Slots` of T = B * N tokens."""
    if isinstance(router, SoftmaxRouter):
        return StaticSoftmax(router.weight, router.top_k, router.gate == "renormalized")
    for kind, form in ((PartRouter, StaticParts), (HierarchicalRouter, StaticHierarchy)):
        if isinstance(router, kind):
            return form(router)
    if isinstance(router, TopAnyRouter):
        return StaticTopAny(router)
    raise ValueError(
        f"router {type(router).__name__} has no static form to export: those that have one are "
        "SoftmaxRouter, PartRouter, HierarchicalRouter and TopAnyRouter"
    )


class StaticSoftmax(nn.Module):
    """`SoftmaxRouter` with the logits `rows` @ x, of which the k best are taken."""

    def __init__(self, rows: Tensor, top_k: int, weighted: bool) -> None:
        super().__init__()
        self.rows = nn.Buffer(rows.detach().float().T.contiguous())
        self.top_k, self.weighted = top_k, weighted

    def forward(self, x: Tensor, scene: Tensor | None) -> Slots:
        best, ids = (x.flatten(0, 1).float() @ self.rows).topk(self.top_k, 1)
        gates = best.softmax(1) * self.top_k if self.weighted else torch.ones_like(best)
        return ids, gates


class StaticParts(nn.Module):
    """`PartRouter`: the best copy of each part."""

    def __init__(self, router: PartRouter) -> None:
        super().__init__()
        self.rows, self.parts = nn.Buffer(router.weight.detach().float().T.clone()), router.parts

    def forward(self, x: Tensor, scene: Tensor | None) -> Slots:
        logits = (x.flatten(0, 1).float() @ self.rows).unflatten(1, (-1, self.parts))
        part = torch.arange(self.parts, device=x.device)
        ids = logits.argmax(1) * self.parts + part
        return ids, torch.ones_like(ids, dtype=torch.float32)


class StaticHierarchy(nn.Module):
    """`HierarchicalRouter` of any variant."""

    def __init__(self, router: HierarchicalRouter) -> None:
        super().__init__()
        self.variant, self.top_k = router.variant, router.top_k
        self.rows = nn.Buffer(router.weight.detach().float().T / router.temperature)
        if self.variant != "instance":
            self.routes, scene_rows = router.active_routes, None
            if not router.shared_scene:
                scene_rows = router.scene_weight.detach().float().T / router.scene_temperature
            self.register_buffer("scene_rows", scene_rows)
            self.pools = nn.Buffer(router.pools.float())  # [R, E]

    def forward(self, x: Tensor, scene: Tensor | None) -> Slots:
        tokens, pool = x.flatten(0, 1).float(), None
        if self.variant != "instance":
            assert scene is not None
            g = scene.float()
            if self.scene_rows is not None:
                g = (g @ self.scene_rows).softmax(1)
            routes = g.topk(self.routes, 1).indices
            pool = self._of_tokens(self.pools[routes].amax(1), x)
            g = self._of_tokens(g, x)
            tokens = torch.cat([tokens, g], 1) if self.variant == "full" else g
        logits = tokens @ self.rows
        if pool is not None:
            logits = logits.masked_fill(pool == 0, torch.finfo(logits.dtype).min)
        best, ids = logits.topk(self.top_k, 1)
        return ids, best.softmax(1)

    @staticmethod
    def _of_tokens(values: Tensor, x: Tensor) -> Tensor:
        return values[:, None].expand(-1, x.shape[1], -1).flatten(0, 1)


class StaticTopAny(nn.Module):
    """`TopAnyRouter`: a slot for every active expert, with a weight of 0 where it isn't chosen."""

    def __init__(self, router: TopAnyRouter) -> None:
        super().__init__()
        rows = router.weight.detach()[router.active].float()
        self.rows = nn.Buffer(F.normalize(rows).T.contiguous())
        self.thresholds = nn.Buffer(router.thresholds.detach()[router.active].float())
        self.forced = router.forced_k and min(router.forced_k, len(rows))

    def forward(self, x: Tensor, scene: Tensor | None) -> Slots:
        cosine = F.normalize(x.flatten(0, 1).float()) @ self.rows
        experts = self.rows.shape[1]
        if self.forced:
            ids = cosine.topk(self.forced, 1).indices
            return ids, torch.full_like(cosine[:, : self.forced], 1 / self.forced)
        chosen = (cosine > self.thresholds).float()
        best = F.one_hot(cosine.argmax(1), experts).float()
        chosen = torch.where(chosen.sum(1, keepdim=True) > 0, chosen, best)
        ids = torch.arange(experts, device=x.device).expand(cosine.shape[0], experts)
        return ids, chosen / chosen.sum(1, keepdim=True)


# Experts -----------------------------------------------------------------------------------------


def weight_of_experts(ids: Tensor, gates: Tensor, experts: int) -> Tensor:
    """`Slots` [T, K] -> the weight of each expert, 0 where it isn't chosen: [T, E]"""
    return (F.one_hot(ids, experts) * gates[..., None]).sum(1)


@torch.library.custom_op("dynamic_dino::sparse_experts", mutates_args=())
def sparse_experts(
    x: Tensor,
    gates: Tensor,
    w1: Sequence[Tensor],
    b1: Sequence[Tensor],
    w2: Sequence[Tensor],
    b2: Sequence[Tensor],
    activation: str,
) -> Tensor:
    """x [T, D], gates [T, E] -> [T, D]. One operator, so that tracing meets no shape that depends
    on data; `onnx_format.py` says what it is in ONNX."""
    y = torch.zeros_like(x)
    for e, weights in enumerate(zip(w1, b1, w2, b2, strict=True)):
        rows = gates[:, e].nonzero()[:, 0]
        hidden = activate(F.linear(x[rows], *weights[:2]), activation)
        y.index_add_(0, rows, F.linear(hidden, *weights[2:]) * gates[rows, e, None])
    return y


@sparse_experts.register_fake
def _(x, gates, w1, b1, w2, b2, activation):
    return torch.empty_like(x)


class SparseExperts(nn.Module):
    """Every expert for its own tokens; w1 [E, H, D], b1 [E, H], w2 [E, D, H], b2 [E, D]."""

    def __init__(self, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> None:
        super().__init__()
        self.weights = nn.ModuleList(
            nn.ParameterList([nn.Parameter(t.clone(), requires_grad=False) for t in w.unbind()])
            for w in (w1, b1, w2, b2)
        )
        self.activation = activation

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        weights = [list(stacked) for stacked in self.weights]
        gates = weight_of_experts(ids, gates, len(weights[0])).to(x.dtype)
        return sparse_experts(x, gates, *weights, self.activation)


class TiledExperts(nn.Module):
    """Slots in tiles of `TILE` rows of one expert. As many tiles as may be needed, whoever is
    chosen; with a slot for each expert, as top-any routing has, that is more than all experts cost.
    """

    def __init__(self, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Buffer(w1.transpose(1, 2).contiguous()), nn.Buffer(b1.clone())
        self.w2, self.b2 = nn.Buffer(w2.transpose(1, 2).contiguous()), nn.Buffer(b2.clone())
        self.activation = activation

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        experts, k = self.w1.shape[0], ids.shape[1]
        slots = x.shape[0] * k
        tiles = slots // TILE + experts
        owner = ids.flatten()
        hot = F.one_hot(owner, experts).to(torch.float32)  # [slots, E]
        rank = (hot.cumsum(0) * hot).sum(1).long() - 1  # among the slots of its expert
        needed = (hot.sum(0).long() + TILE - 1).div(TILE, rounding_mode="floor")
        last = needed.float().cumsum(0).long()  # the first tile after those of each expert
        # The place of each slot, all different: its tile, and its row there. Tiles stay a dimension
        # of their own, so that tracing any number of tokens meets no division of one by the other.
        own = (last - needed)[owner] + rank.div(TILE, rounding_mode="floor")
        row = rank % TILE
        token = torch.arange(slots, device=x.device).div(k, rounding_mode="floor")
        source = x.new_zeros(tiles, TILE, dtype=torch.int64).index_put((own, row), token)
        tile = torch.arange(tiles, device=x.device)
        of = (tile[:, None] >= last).long().sum(1).clamp(max=experts - 1)
        hidden = activate(x[source] @ self.w1[of] + self.b1[of][:, None], self.activation)
        y = (hidden @ self.w2[of] + self.b2[of][:, None])[own, row]
        return (y.view(x.shape[0], k, x.shape[1]) * gates[..., None].to(y.dtype)).sum(1)


class AllExperts(nn.Module):
    """Every expert for every token: two matrix products."""

    def __init__(self, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Buffer(w1.flatten(0, 1)), nn.Buffer(b1.flatten())
        self.w2, self.b2 = nn.Buffer(w2.transpose(0, 1).flatten(1)), nn.Buffer(b2.clone())
        self.activation = activation

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        weights = weight_of_experts(ids, gates, self.b2.shape[0]).to(x.dtype)
        hidden = activate(F.linear(x, self.w1, self.b1), self.activation)
        hidden = hidden.unflatten(1, (self.b2.shape[0], -1)) * weights[..., None]
        return F.linear(hidden.flatten(1), self.w2) + weights @ self.b2


_FORMS = {"sparse": SparseExperts, "tiles": TiledExperts, "all": AllExperts}
