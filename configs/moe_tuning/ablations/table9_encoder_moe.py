"""Table 9: MoE in the image FFN of the enhancer too, images of 800 x 1333."""

from ...common.moe import experts
from ..dynamic_dino_x16_top2 import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.enhancer.layer.image.ffn = experts(model.enhancer.layer.image.ffn, num_experts=16, top_k=2)
inference.size = [800, 1333]
model.canvas = None
train.output_dir = "output/ablations/table9_encoder_moe"
