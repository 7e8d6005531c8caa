"""Table 7: experts in the enhancer and in the decoder."""

from ..common.moe import hierarchical
from .edge import dataloader, inference, lr_multiplier, model, optimizer, train  # noqa: F401

model.enhancer.layer.image.ffn = hierarchical(model.enhancer.layer.image.ffn)
train.output_dir = "output/himoe/edge_encoder_decoder"
