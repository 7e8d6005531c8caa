"""Ablation of what trains: the MoE layers and the enhancer's cross-attention train."""

from ...common.moe import EXPERTS, FUSION
from ..dynamic_dino_x16_top2 import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

train.trainable = [*EXPERTS, *FUSION]
train.output_dir = "output/ablations/parts_experts_fusion"
