"""Table 6: 4 experts, one to a route: a query's 2 are those of the scene's 2 routes."""

from .dino import dataloader, inference, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.layer.ffn.router.num_experts = 4
train.output_dir = "output/himoe/dino_x4_top2"
