"""HI-MoE's experts in nano's enhancer only."""

from ..common.moe import diversity, hierarchical, squared_balance
from ..pretrain.nano_stamps import model  # dense
from .nano_x16_stamps import dataloader, inference, lr_multiplier, optimizer, train  # noqa: F401

model.enhancer.layer.image.ffn = hierarchical(model.enhancer.layer.image.ffn)
model.criterion.router_losses = [squared_balance, diversity]
train.output_dir = "output/himoe/nano_encoder_stamps"
