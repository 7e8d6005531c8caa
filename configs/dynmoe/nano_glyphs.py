"""nano with DynMoE on glyphs: MoE-Tuning of the narrow dense model."""

from ..common.moe import sparse_gating, top_any
from ..moe_tuning.nano_x16_glyphs import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn = top_any(model.decoder.layer.ffn)
model.criterion.router_losses = [sparse_gating]

train.adaptive_experts = dict(enabled=True, period=100, window=100)
train.output_dir = "output/dynmoe/nano_glyphs"
