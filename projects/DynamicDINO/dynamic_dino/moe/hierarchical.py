"""`HierarchicalRouter`: HI-MoE's router, which looks at the scene first and then at each token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from dynamic_dino_kernels.moe.reference import best_first
from torch import Tensor, nn

from .routers import Router, best_experts
from .routing import Routing
from .scene_router import route_probabilities

VARIANTS = ("full", "instance", "scene")


class HierarchicalRouter(Router):
    """The scene chooses a pool of experts, and each token chooses its k experts from the pool
    (HI-MoE, arXiv 2604.04908, section 3.3 and Algorithm 1).

    g = softmax(W_g scene / tau_s) over R scene routes; the experts of the S most probable routes
    are the pool. e = softmax(W_i [token; g] / tau_i) over all experts; of those in the pool the k
    most probable are taken, and their e, divided by their sum, are the gates. Experts that start
    as whole copies of one FFN hence start as that FFN.

    Variants (the paper's Table 4):

    - ``full``: as above.
    - ``instance``: e = softmax(W_i token / tau_i), no scene and no pool. In the decoder, whose
      tokens are queries, the paper's "instance-only"; on image tokens its "Token-MoE".
    - ``scene``: e = softmax(W_i g / tau_i), so that all tokens of an image share its experts.

    Args:
        num_experts, top_k: the paper's N_e and K.
        num_routes, active_routes: R and S, the paper's N_s and K_s.
        scene_temperature, temperature: tau_s and tau_i.
        route_experts: the experts of each route. The paper doesn't say which they are; None gives
            each route E / R of them, in order.
        std: standard deviation of the rows at the start, small as in `PartRouter`.
        scene_dim: width of the scene's features, if not `dim`, see `ProposalStatistics`.
        shared_scene: the detector's `SceneRouter` has computed g, which is given in the scene's
            place; otherwise each layer has a scene router of its own.
        route_names: what figures and tables call the routes, e.g. the paper's "indoor", "outdoor",
            "crowd" and "generalist". Labels: nothing teaches a route to be what it is called.

    Raises:
        ValueError: numbers out of range, experts without a route, pools of fewer than k experts,
            or another number of names than of routes.
    """

    pools: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int = 16,
        top_k: int = 2,
        num_routes: int = 4,
        active_routes: int = 2,
        variant: str = "full",
        scene_temperature: float = 1.0,
        temperature: float = 1.0,
        route_experts: Sequence[Sequence[int]] | None = None,
        std: float = 0.02,
        scene_dim: int | None = None,
        shared_scene: bool = False,
        route_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant {variant!r}: choose one of {', '.join(VARIANTS)}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must lie between 1 and num_experts={num_experts}")
        if min(scene_temperature, temperature) <= 0:
            raise ValueError(
                f"scene_temperature={scene_temperature} and temperature={temperature} must be "
                "positive"
            )
        self.num_experts, self.top_k = num_experts, top_k
        self.active_routes, self.variant, self.std = active_routes, variant, std
        self.scene_temperature, self.temperature = scene_temperature, temperature
        if route_names is not None and len(route_names) != num_routes:
            raise ValueError(f"{len(route_names)} route_names for num_routes={num_routes} routes")
        self.shared_scene = shared_scene
        self.route_names = list(route_names or map(str, range(num_routes)))
        width = {"full": dim + num_routes, "instance": dim, "scene": num_routes}[variant]
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        if variant != "instance":
            owned = owned_experts(num_experts, num_routes, route_experts)
            check_pools(owned, active_routes, top_k)
            pools = torch.tensor([[e in experts for e in range(num_experts)] for experts in owned])
            self.register_buffer("pools", pools, persistent=False)  # [R, E]
            if not shared_scene:
                self.scene_weight = nn.Parameter(torch.empty(num_routes, scene_dim or dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0, self.std)

    def forward(self, tokens: Tensor, scene: Tensor | None = None) -> Routing:
        """tokens [B, N, D], scene [B, D], or g [B, R] with `shared_scene` -> Routing of T = B * N
        tokens, the scene's part of it repeated for each token of its image. In float32, outside
        autocast.

        Raises:
            ValueError: no scene, or one of another width, unless the variant needs none.
        """
        if self.variant == "instance":
            with torch.autocast(tokens.device.type, enabled=False):
                return self.choose(tokens.flatten(0, 1).float())
        if scene is None:
            raise ValueError(
                f"HierarchicalRouter with variant={self.variant!r} needs the scene, [B, D], which "
                "this layer isn't given: use variant='instance' here"
            )
        number = self.pools.shape[0]
        width = number if self.shared_scene else self.scene_weight.shape[1]
        if scene.shape[1] != width:
            raise ValueError(
                f"the scene has {scene.shape[1]} features, "
                + (
                    f"not the probabilities of {number} routes, as shared_scene=True expects: it "
                    "goes with model.scene_router, a SceneRouter of as many routes"
                    if self.shared_scene
                    else f"the router's scene_dim is {width}: with ProposalStatistics it is dim + "
                    "len(STATISTICS), in the decoder alone; with model.scene_router, the routers "
                    "have shared_scene=True"
                )
            )
        g = scene
        if not self.shared_scene:
            g = route_probabilities(scene, self.scene_weight, self.scene_temperature)
        with torch.autocast(tokens.device.type, enabled=False):
            routes = best_first(g)[:, : self.active_routes]
            pool = self.pools[routes].any(1)
            g, routes, pool = (per_token(t, tokens) for t in (g, routes, pool))
            x = tokens.flatten(0, 1).float()
            routing = self.choose(torch.cat([x, g], 1) if self.variant == "full" else g, pool)
        routing.scene_probs, routing.scene_routes = g, routes.int()
        return routing

    def choose(self, x: Tensor, pool: Tensor | None = None) -> Routing:
        """x [T, width of W_i], pool bool [T, E] or None -> Routing"""
        logits = x @ self.weight.float().T / self.temperature
        masked = self.masked(x.device)
        if pool is not None:
            masked = ~pool if masked is None else ~pool | masked
        ids, gates = best_experts(logits, self.top_k, masked)
        return Routing(ids, gates, logits.softmax(-1))


def owned_experts(
    num_experts: int, num_routes: int, route_experts: Sequence[Sequence[int]] | None
) -> list[set[int]]:
    """The experts of each route. Raises ValueError unless every expert has a route."""
    if route_experts is None:
        if num_routes < 1 or num_experts % num_routes:
            raise ValueError(
                f"num_experts={num_experts} can't be shared evenly by num_routes={num_routes}: "
                "choose numbers that divide, or name the experts of each route in route_experts"
            )
        share = num_experts // num_routes
        route_experts = [range(r * share, (r + 1) * share) for r in range(num_routes)]
    owned = [set(experts) for experts in route_experts]
    named = sorted(set().union(*owned))
    if len(owned) != num_routes or named != list(range(num_experts)):
        raise ValueError(
            f"route_experts names experts {named} for {len(owned)} routes; it must name each of "
            f"0 to {num_experts - 1}, for num_routes={num_routes} routes"
        )
    return owned


def check_pools(owned: list[set[int]], active_routes: int, top_k: int) -> None:
    """Raises ValueError if some choice of routes gives fewer than k experts."""
    if not 1 <= active_routes <= len(owned):
        raise ValueError(
            f"active_routes={active_routes} must lie between 1 and num_routes={len(owned)}"
        )
    smallest = min(len(set().union(*chosen)) for chosen in combinations(owned, active_routes))
    if smallest < top_k:
        raise ValueError(
            f"top_k={top_k}, but {active_routes} routes may give a pool of only {smallest} "
            "experts: raise active_routes, or lower top_k"
        )


def per_token(values: Tensor, tokens: Tensor) -> Tensor:
    """One row for each image -> one for each of its tokens: [B, X] -> [B * N, X]"""
    return values[:, None].expand(-1, tokens.shape[1], -1).flatten(0, 1)
