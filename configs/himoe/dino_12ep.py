"""HI-MoE in 12 epochs, to be compared with pretrain/dino_r50_coco_12ep.py."""

from ..pretrain.dino_r50_coco_12ep import lr_multiplier  # noqa: F401
from .dino import dataloader, inference, model, optimizer, train  # noqa: F401

# 12 ep = 88,715 iterations * 16 images / 118,287 images
train.max_iter = 88_715
train.output_dir = "output/himoe/dino_12ep"
