"""A router of every kind, of small layers."""

from dynamic_dino.moe.hierarchical import HierarchicalRouter
from dynamic_dino.moe.part_router import PartRouter
from dynamic_dino.moe.routers import SoftmaxRouter
from dynamic_dino.moe.top_any import TopAnyRouter

DIM = 8


def softmax(**options):
    return lambda e, k: SoftmaxRouter(DIM, e * k, k, std=1.0, **options)


def hierarchical(variant):
    return lambda e, k: HierarchicalRouter(
        DIM, 4 * e, k, 4, 2 if k <= 2 * e else 4, variant, temperature=0.7, std=1.0
    )


def top_any(forced):
    def make(e, k):
        return TopAnyRouter(DIM, e + k, initial_experts=e, forced_k=forced and min(k, e))

    return make


# A router of about `e` experts or copies, of which a token gets k.
ROUTERS = {
    "indicator": softmax(),
    "renormalized": softmax(gate="renormalized", tied=False),
    "straight-through": softmax(gate="straight_through", tied=False),
    "parts": lambda e, k: PartRouter(DIM, e * k, k, std=1.0),
    "full": hierarchical("full"),
    "instance": hierarchical("instance"),
    "scene": hierarchical("scene"),
    "top-any": top_any(None),
    "forced": top_any(1),
}
