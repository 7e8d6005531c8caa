"""Flat routing of nano's queries; moe_tuning/nano_dense_control_stamps.py is the dense control."""

from .nano_x16_stamps import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn.router.variant = "instance"
train.output_dir = "output/himoe/nano_instance_only_stamps"
