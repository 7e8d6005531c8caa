"""Ablation of k: 8 whole copies of each FFN, 1 active; the parameters of x16-Top2."""

from ..dynamic_dino_x16_top2 import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn.router.num_experts = 8
model.decoder.layer.ffn.router.top_k = 1
train.output_dir = "output/ablations/top1_x8"
