"""Grounding DINO with Swin-B of window 12: the architecture of the larger public weights."""

from .gdino_tiny import inference, model  # noqa: F401

model.backbone.name = "swin_base_patch4_window12_384"
model.neck.in_channels = [256, 512, 1024]
