"""nano with HI-MoE's router on photos and Stamps: MoE-Tuning of the dense model that knows them, 16
whole copies.

Its control is the one of moe_tuning/nano_x16_photos: pretrain/nano_photos:control.
"""

from ..common.moe import diversity, hierarchical, squared_balance
from ..moe_tuning.nano_x16_photos import (  # noqa: F401
    data,
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn = hierarchical(model.decoder.layer.ffn)
model.criterion.router_losses = [squared_balance, diversity]
train.output_dir = "output/himoe/nano_x16_photos"
