"""Table 5: 4 active experts per query."""

from .dino import dataloader, inference, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.layer.ffn.router.top_k = 4
train.output_dir = "output/himoe/dino_x16_top4"
