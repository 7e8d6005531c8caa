"""gdino_nano x4-Top2: the fine-tuned detector, MoE-tuned on the same data; see gdino_tiny_x16."""

from ..common.moe import EXPERTS, FUSION, experts, load_balance
from ..finetune.gdino_nano_custom import (  # noqa: F401
    data,
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn = experts(model.decoder.layer.ffn, num_experts=4, top_k=2)
model.criterion.router_losses = [load_balance]

# 4 images * 60 iterations
train.max_iter = 60
train.trainable = [*FUSION, *EXPERTS, "*.class_head.*", "*.box_head.*"]
train.init_checkpoint = "output/gdino_nano_custom/model_final.pth"
optimizer.lr = 2e-4
train.output_dir = "output/gdino_nano_x4"
