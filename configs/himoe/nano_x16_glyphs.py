"""nano with HI-MoE's router on glyphs: MoE-Tuning of the narrow dense model, 16 whole copies."""

from ..common.moe import diversity, hierarchical, squared_balance
from ..moe_tuning.nano_x16_glyphs import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn = hierarchical(model.decoder.layer.ffn)
model.criterion.router_losses = [squared_balance, diversity]
train.output_dir = "output/himoe/nano_x16_glyphs"
