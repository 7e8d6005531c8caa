"""Table 6: 8 experts."""

from .dino import dataloader, inference, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.layer.ffn.router.num_experts = 8
train.output_dir = "output/himoe/dino_x8_top2"
