"""All queries of an image share the experts that its scene chooses."""

from .nano_x16_stamps import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn.router.variant = "scene"
train.output_dir = "output/himoe/nano_scene_only_stamps"
