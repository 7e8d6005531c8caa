"""Table 4, instance-only: flat routing of the queries, without a scene."""

from .dino import dataloader, inference, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.layer.ffn.router.variant = "instance"
train.output_dir = "output/himoe/dino_instance_only"
