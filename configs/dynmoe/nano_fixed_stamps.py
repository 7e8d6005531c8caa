"""nano with top-any routing among 8 experts that stay."""

from .nano_stamps import dataloader, inference, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.layer.ffn.router.initial_experts = 8
train.adaptive_experts.enabled = False
train.output_dir = "output/dynmoe/nano_fixed_stamps"
