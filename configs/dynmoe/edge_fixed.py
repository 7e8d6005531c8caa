"""Top-any routing among 8 experts that stay: what the adaptive process adds is the difference."""

from .edge import dataloader, inference, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.layer.ffn.router.initial_experts = 8
train.adaptive_experts.enabled = False
train.output_dir = "output/dynmoe/edge_fixed"
