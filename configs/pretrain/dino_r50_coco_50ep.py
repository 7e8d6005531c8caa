"""DINO (4 levels, ResNet-50) on COCO, 50 epochs: HI-MoE's dense base, 51.3 AP in its Table 3.

The rate falls after 40 epochs, as in Deformable DETR; HI-MoE doesn't say when.
"""

from ..common.optim import step_schedule
from .dino_r50_coco_12ep import dataloader, inference, model, optimizer, train  # noqa: F401

# 50 ep = 369,647 iterations * 16 images / 118,287 images
train.max_iter = 369_647
lr_multiplier = step_schedule(milestones=[40 / 50], warmup=1000 / 369_647)
train.output_dir = "output/dino_r50_coco_50ep"
