"""HI-MoE by MoE-Tuning of the dense base, for 12 epochs: 16 whole copies of each FFN.

The paper trains end to end. Here it starts with the dense model's boxes and scores, and experts,
routers and heads train.
"""

from ..common.moe import EXPERTS, HEADS
from ..pretrain.dino_r50_coco_12ep import lr_multiplier  # noqa: F401
from .dino import dataloader, inference, model, optimizer, train  # noqa: F401

# 12 ep = 88,715 iterations * 16 images / 118,287 images
train.max_iter = 88_715
train.trainable = [*EXPERTS, *HEADS]
train.init_checkpoint = "output/dino_r50_coco_50ep/model_final.pth"
optimizer.params.lr_factors = {}
train.output_dir = "output/himoe/dino_tuning"
