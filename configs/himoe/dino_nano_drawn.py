"""HI-MoE on the nano DINO and the drawn shapes: MoE-Tuning of the dense one."""

from ..common.moe import EXPERTS, HEADS, diversity, hierarchical, squared_balance
from ..pretrain.dino_nano_drawn import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn = hierarchical(model.decoder.layer.ffn)
model.criterion.router_losses = [squared_balance, diversity]

# 256 images * 3.1 epochs / 4 images = 200 iterations
train.max_iter = 200
train.trainable = [*EXPERTS, *HEADS]
train.init_checkpoint = "output/dino_nano_drawn/model_final.pth"
train.eval_first = True
optimizer.lr = 2e-4
train.output_dir = "output/himoe/dino_nano_drawn"
