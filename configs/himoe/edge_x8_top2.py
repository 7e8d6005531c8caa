"""Table 6: 8 experts."""

from .edge import dataloader, inference, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.layer.ffn.router.num_experts = 8
train.output_dir = "output/himoe/edge_x8_top2"
