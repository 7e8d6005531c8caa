"""Table 4, Token-MoE: flat routing of image tokens, in the encoder's FFNs.

Two whole experts for each of 21,000 tokens cost much more than the paper's 285 GFLOPs; with
model.enhancer.layer.image.ffn.router.top_k=1 they cost what the dense FFN costs.
"""

from ..common.moe import diversity, hierarchical, squared_balance
from ..pretrain.dino_r50_coco_50ep import model  # dense
from .dino import dataloader, inference, lr_multiplier, optimizer, train  # noqa: F401

model.enhancer.layer.image.ffn = hierarchical(model.enhancer.layer.image.ffn, "instance")
model.criterion.router_losses = [squared_balance, diversity]
train.output_dir = "output/himoe/dino_token_moe"
