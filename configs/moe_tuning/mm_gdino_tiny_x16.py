"""MM-Grounding-DINO (Swin-T) x16-Top2: the public weights, MoE-tuned on your own data."""

from ..common.moe import EXPERTS, FUSION, experts, load_balance
from ..finetune.mm_gdino_tiny_custom import (  # noqa: F401
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
train.output_dir = "output/mm_gdino_tiny_x16"
