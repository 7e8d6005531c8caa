"""Table 5: 1 active expert per query."""

from .edge import dataloader, inference, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.layer.ffn.router.top_k = 1
train.output_dir = "output/himoe/edge_x16_top1"
