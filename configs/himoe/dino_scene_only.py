"""Table 4, scene-only: all queries of an image share the experts that its scene chooses."""

from .dino import dataloader, inference, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.layer.ffn.router.variant = "scene"
train.output_dir = "output/himoe/dino_scene_only"
