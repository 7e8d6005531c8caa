"""nano with as many as 16 experts."""

from .nano_stamps import dataloader, inference, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.layer.ffn.router.num_experts = 16
train.output_dir = "output/dynmoe/nano_max16_stamps"
