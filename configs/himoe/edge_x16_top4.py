"""Table 5: 4 active experts per query."""

from .edge import dataloader, inference, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.layer.ffn.router.top_k = 4
train.output_dir = "output/himoe/edge_x16_top4"
