"""nano x16-Top2 on the drawn shapes: the smallest MoE-Tuning, for tests and first steps."""

from ..common.moe import MOE_TUNING, experts, load_balance
from ..pretrain.nano_drawn import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn = experts(model.decoder.layer.ffn, num_experts=16, top_k=2)
model.criterion.router_losses = [load_balance]

train.trainable = MOE_TUNING
train.init_checkpoint = "output/nano_drawn/model_final.pth"
optimizer.lr = 2e-4
train.output_dir = "output/nano_x16_drawn"
