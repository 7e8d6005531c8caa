"""Ablation of what trains: only the MoE layers train."""

from ...common.moe import EXPERTS
from ..dynamic_dino_x16_top2 import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

train.trainable = EXPERTS
train.output_dir = "output/ablations/parts_experts"
