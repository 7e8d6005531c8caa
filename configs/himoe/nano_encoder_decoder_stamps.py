"""Experts in nano's enhancer and in its decoder."""

from ..common.moe import hierarchical
from .nano_x16_stamps import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.enhancer.layer.image.ffn = hierarchical(model.enhancer.layer.image.ffn)
train.output_dir = "output/himoe/nano_encoder_decoder_stamps"
