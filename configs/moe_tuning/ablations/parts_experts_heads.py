"""Ablation of what trains: the MoE layers and the detection head train."""

from ...common.moe import EXPERTS, HEADS
from ..dynamic_dino_x16_top2 import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

train.trainable = [*EXPERTS, *HEADS]
train.output_dir = "output/ablations/parts_experts_heads"
