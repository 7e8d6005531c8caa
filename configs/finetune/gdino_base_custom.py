"""Grounding DINO (Swin-B), fine-tuned on your own COCO-format data."""

from ..common.models.gdino_base import inference, model  # noqa: F401
from .gdino_tiny_custom import (  # noqa: F401
    data,
    dataloader,
    lr_multiplier,
    optimizer,
    train,
)

model.text_encoder.frozen = True
train.init_checkpoint = "hf:IDEA-Research/grounding-dino-base"
train.output_dir = "output/gdino_base_custom"
