"""Closed-set DINO (ResNet-50) x16-Top2: Dynamic-DINO's experts in a detector without text, tuned
from the dense model for 12 epochs of COCO."""

from ..common.moe import EXPERTS, HEADS, experts, load_balance
from ..himoe.dino_tuning import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    optimizer,
    train,
)
from ..pretrain.dino_r50_coco_12ep import model  # noqa: F401  (dense)

model.decoder.layer.ffn = experts(model.decoder.layer.ffn, num_experts=16, top_k=2)
model.criterion.router_losses = [load_balance]

train.trainable = [*EXPERTS, *HEADS]
train.output_dir = "output/dino_r50_x16"
