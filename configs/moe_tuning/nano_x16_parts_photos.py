"""nano x16-Top2 on photos and Stamps, of which a token takes each part of the FFN once; ours."""

from ..common.moe import load_balance, part_by_part
from ..pretrain.nano_photos import model
from .nano_x16_photos import (  # noqa: F401
    data,
    dataloader,
    inference,
    lr_multiplier,
    optimizer,
    train,
)

model.decoder.layer.ffn = part_by_part(model.decoder.layer.ffn)
model.criterion.router_losses = [load_balance]
train.output_dir = "output/nano_x16_parts_photos"
