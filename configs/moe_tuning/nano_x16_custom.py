"""nano x16-Top2, MoE-tuned on your own data; see common/data/custom.py."""

from ..common.moe import MOE_TUNING, experts, load_balance
from ..finetune.nano_custom import (  # noqa: F401
    data,
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
train.output_dir = "output/nano_x16_custom"
