"""Experts in the enhancer and in the decoder."""

from ..common.moe import top_any
from .edge import dataloader, inference, lr_multiplier, model, optimizer, train  # noqa: F401

model.enhancer.layer.image.ffn = top_any(model.enhancer.layer.image.ffn)
train.output_dir = "output/dynmoe/edge_encoder_decoder"
