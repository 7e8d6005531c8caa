"""Table 7: experts in the encoder and in the decoder."""

from ..common.moe import hierarchical
from .dino import dataloader, inference, lr_multiplier, model, optimizer, train  # noqa: F401

model.enhancer.layer.image.ffn = hierarchical(model.enhancer.layer.image.ffn)
train.output_dir = "output/himoe/dino_encoder_decoder"
