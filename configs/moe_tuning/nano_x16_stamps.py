"""nano x16-Top2 on Stamps: MoE-Tuning of the dense nano model."""

from ..common.moe import MOE_TUNING, experts, load_balance
from ..common.optim import cosine_schedule
from ..pretrain.nano_stamps import dataloader, inference, model, optimizer, train  # noqa: F401

model.decoder.layer.ffn = experts(model.decoder.layer.ffn, num_experts=16, top_k=2)
model.criterion.router_losses = [load_balance]

# 10,000 images * 0.5 epochs / 8 images = 625 iterations
train.max_iter = 625
train.trainable = MOE_TUNING
train.init_checkpoint = "package:dynamic_dino/weights/nano_dense.safetensors"
lr_multiplier = cosine_schedule(warmup=0.04)
optimizer.lr = 1e-4
train.output_dir = "output/nano_x16_stamps"
