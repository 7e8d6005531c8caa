"""nano with DynMoE on the drawn shapes, for tests and first steps."""

from ..common.moe import sparse_gating, top_any
from ..moe_tuning.nano_x16_drawn import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn = top_any(model.decoder.layer.ffn)
model.criterion.router_losses = [sparse_gating]

train.adaptive_experts = dict(enabled=True, period=20, window=20)
train.output_dir = "output/dynmoe/nano_drawn"
