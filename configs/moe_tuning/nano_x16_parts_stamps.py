"""nano x16-Top2 of which a token takes each part of the FFN once; ours."""

from ..common.moe import part_by_part
from ..pretrain.nano_stamps import model
from .nano_x16_stamps import (  # noqa: F401
    dataloader,
    inference,
    load_balance,
    lr_multiplier,
    optimizer,
    train,
)

model.decoder.layer.ffn = part_by_part(model.decoder.layer.ffn)
model.criterion.router_losses = [load_balance]
train.output_dir = "output/nano_x16_parts_stamps"
