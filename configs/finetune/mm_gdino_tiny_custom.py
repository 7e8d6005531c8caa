"""MM-Grounding-DINO (Swin-T), fine-tuned on your own COCO-format data."""

from ..common.models.mm_gdino_tiny import inference, model  # noqa: F401
from .gdino_tiny_custom import (  # noqa: F401
    data,
    dataloader,
    lr_multiplier,
    optimizer,
    train,
)

model.text_encoder.frozen = True
train.init_checkpoint = "hf:openmmlab-community/mm_grounding_dino_tiny_o365v1_goldg_v3det"
train.output_dir = "output/mm_gdino_tiny_custom"
