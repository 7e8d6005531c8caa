"""Table 5: 1 active expert per query."""

from .dino import dataloader, inference, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.layer.ffn.router.top_k = 1
train.output_dir = "output/himoe/dino_x16_top1"
