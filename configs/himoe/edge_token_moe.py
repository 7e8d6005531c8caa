"""Table 4, Token-MoE: flat routing of image tokens, in the enhancer's FFNs."""

from ..common.moe import diversity, hierarchical, squared_balance
from ..pretrain.gdino15_edge_7ep import model  # dense
from .edge import dataloader, inference, lr_multiplier, optimizer, train  # noqa: F401

model.enhancer.layer.image.ffn = hierarchical(model.enhancer.layer.image.ffn, "instance")
model.criterion.router_losses = [squared_balance, diversity]
train.output_dir = "output/himoe/edge_token_moe"
