"""Table 4, scene-only: all queries of an image share the experts that its scene chooses."""

from .edge import dataloader, inference, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.layer.ffn.router.variant = "scene"
train.output_dir = "output/himoe/edge_scene_only"
