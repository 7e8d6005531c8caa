"""Ablation of k: 8 copies of each FFN cut in four, 4 active; the parameters of x16-Top2."""

from ..dynamic_dino_x16_top2 import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn.router.num_experts = 32
model.decoder.layer.ffn.router.top_k = 4
train.output_dir = "output/ablations/top4_x32"
