"""Table 7: experts in the encoder only."""

from ..common.moe import diversity, hierarchical, squared_balance
from ..pretrain.dino_r50_coco_50ep import model  # dense
from .dino import dataloader, inference, lr_multiplier, optimizer, train  # noqa: F401

model.enhancer.layer.image.ffn = hierarchical(model.enhancer.layer.image.ffn)
model.criterion.router_losses = [squared_balance, diversity]
train.output_dir = "output/himoe/dino_encoder"
