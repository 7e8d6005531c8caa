"""MoE-Tuning as a few names that recipes combine: Dynamic-DINO's, HI-MoE's and DynMoE's experts."""

from detectron2.config import LazyCall as L
from dynamic_dino.moe.hierarchical import HierarchicalRouter
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.losses import (
    DiversityLoss,
    LoadBalanceLoss,
    SparseGatingLoss,
    SquaredBalanceLoss,
)
from dynamic_dino.moe.part_router import PartRouter
from dynamic_dino.moe.routers import SoftmaxRouter
from dynamic_dino.moe.top_any import TopAnyRouter

# What trains (paper, section 3.1)
FUSION = ["enhancer.layers.*.fusion.*"]  # cross-attention of the feature enhancer
EXPERTS = ["*.ffn.experts.*", "*.ffn.router.*"]  # MoE layers
HEADS = ["*.class_head.*", "*.box_head.*"]  # detection head
MOE_TUNING = [*FUSION, *EXPERTS, *HEADS]


def mixture(dense, router, **options):
    """The layer that takes a dense FFN's place."""
    return L(MoEFeedForward)(dim=dense.dim, hidden=dense.hidden, router=router, **options)


def experts(dense, num_experts: int = 16, top_k: int = 2, **options):
    """Dynamic-DINO: xE-TopK, E experts of hidden / k units each."""
    router = L(SoftmaxRouter)(dim=dense.dim, num_experts=num_experts, top_k=top_k)
    return mixture(dense, router, **options)


def part_by_part(dense, num_experts: int = 16, parts: int = 2, **options):
    """xE-TopK of which a token takes each part once, from whichever copy."""
    router = L(PartRouter)(dim=dense.dim, num_experts=num_experts, parts=parts)
    return mixture(dense, router, **options)


def hierarchical(dense, variant: str = "full", num_experts: int = 16, top_k: int = 2, **options):
    """HI-MoE: the scene, or the token, or both choose among whole copies of a dense FFN."""
    router = L(HierarchicalRouter)(
        dim=dense.dim, variant=variant, num_experts=num_experts, top_k=top_k
    )
    return mixture(dense, router, response_tokens=32, **options)


def top_any(dense, num_experts: int = 8, initial_experts: int = 6, **options):
    """DynMoE: as many whole copies of a dense FFN as a token takes; of 8 slots 6 are filled at the
    start (the paper's vision tasks)."""
    router = L(TopAnyRouter)(
        dim=dense.dim, num_experts=num_experts, initial_experts=initial_experts
    )
    return mixture(dense, router, **options)


load_balance = L(LoadBalanceLoss)(weight=0.01, over_layers="mean")
squared_balance = L(SquaredBalanceLoss)(weight=0.01, over_layers="mean")
diversity = L(DiversityLoss)(weight=0.001, over_layers="mean")
sparse_gating = L(SparseGatingLoss)(weight=0.01, over_layers="mean")
