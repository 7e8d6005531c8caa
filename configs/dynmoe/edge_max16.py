"""As many as 16 experts."""

from .edge import dataloader, inference, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.layer.ffn.router.num_experts = 16
train.output_dir = "output/dynmoe/edge_max16"
