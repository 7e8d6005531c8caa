"""Dynamic-DINO's MoE-Tuning as a few names that recipes combine."""

from detectron2.config import LazyCall as L
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.losses import LoadBalanceLoss

# What trains, part by part (paper, section 3.1)
FUSION = ["enhancer.layers.*.fusion.*"]  # cross-attention of the feature enhancer
EXPERTS = ["*.ffn.experts.*", "*.ffn.router.*"]  # MoE layers
HEADS = ["*.class_head.*", "*.box_head.*"]  # detection head
MOE_TUNING = [*FUSION, *EXPERTS, *HEADS]


def experts(dense, num_experts: int, top_k: int = 2, **options):
    """The MoE that takes a dense FFN's place: xE-TopK, E experts of hidden / k units each."""
    return L(MoEFeedForward)(
        dim=dense.dim, hidden=dense.hidden, num_experts=num_experts, top_k=top_k, **options
    )


load_balance = L(LoadBalanceLoss)(weight=0.01)
