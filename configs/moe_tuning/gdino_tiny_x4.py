"""Grounding DINO (Swin-T) x4-Top2, 2 copies of each FFN cut in two."""

from .gdino_tiny_x16 import (  # noqa: F401
    data,
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn.router.num_experts = 4
train.output_dir = "output/gdino_tiny_x4"
