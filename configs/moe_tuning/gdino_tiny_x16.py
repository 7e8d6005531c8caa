"""Grounding DINO (Swin-T) x16-Top2: the public weights, MoE-tuned on your own COCO-format data.

Each decoder FFN becomes 16 experts of 1024 units, 8 copies cut in two; 2 are active per query.
The class head of Grounding DINO has no parameters, so of the heads only boxes are trained.
"""

from ..common.moe import EXPERTS, FUSION, experts, load_balance
from ..finetune.gdino_tiny_custom import (  # noqa: F401
    data,
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn = experts(model.decoder.layer.ffn, num_experts=16, top_k=2)
model.criterion.router_losses = [load_balance]

train.trainable = [*FUSION, *EXPERTS, "*.box_head.*"]
optimizer.params.lr_factors = {}
train.output_dir = "output/gdino_tiny_x16"
