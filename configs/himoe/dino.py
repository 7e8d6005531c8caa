"""HI-MoE: DINO with ResNet-50 and its router in the decoder, trained end to end for 50 epochs.

Each decoder FFN is 16 experts of its size; of 4 scene routes 2 are kept, of their 8 experts 2 per
query. The paper's Tables 3, 4 and 5 call this 282 GFLOPs, which whole experts in the decoder come
close to, and 52M parameters, which is the variant small_experts.
"""

from ..common.moe import diversity, hierarchical, squared_balance
from ..pretrain.dino_r50_coco_50ep import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn = hierarchical(model.decoder.layer.ffn)
model.criterion.router_losses = [squared_balance, diversity]
train.output_dir = "output/himoe/dino"
