"""Dynamic-DINO x16-Top2, the paper's main model: MoE-Tuning of the pre-trained dense base.

Each decoder FFN becomes 16 experts of 1024 units, 8 copies cut in two; 2 are active per query.
Set train.init_checkpoint to the dense checkpoint of pretrain/gdino15_edge_7ep.py.
"""

from ..common.moe import MOE_TUNING, experts, load_balance
from ..common.optim import step_schedule
from ..pretrain.gdino15_edge_7ep import (  # noqa: F401
    dataloader,
    inference,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn = experts(model.decoder.layer.ffn, num_experts=16, top_k=2)
model.criterion.router_losses = [load_balance]

# 10 ep = 244,219 iterations * 64 images / 1,563,000 images; the rate is ours
train.max_iter = 244_219
train.trainable = MOE_TUNING
train.init_checkpoint = "output/gdino15_edge_7ep/model_final.pth"
lr_multiplier = step_schedule(milestones=[19 / 30, 26 / 30], warmup=1000 / 244_219)
optimizer.lr = 1e-4
optimizer.params.lr_factors = {}
train.output_dir = "output/dynamic_dino_x16_top2"
