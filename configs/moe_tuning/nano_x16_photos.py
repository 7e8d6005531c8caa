"""nano x16-Top2 on photos and Stamps: MoE-Tuning of the dense model that knows them.

Its control, the dense model tuned for as long with the same parts free, is the variant
pretrain/nano_photos:control.
"""

from ..common.moe import MOE_TUNING, experts, load_balance
from ..pretrain.nano_photos import (  # noqa: F401
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

# 4 images * 1,250 iterations, as many as nano_x16_stamps sees
train.max_iter = 1250
optimizer.lr = 1e-4
train.trainable = MOE_TUNING
train.init_checkpoint = "package:dynamic_dino/weights/nano_photos.safetensors"
train.output_dir = "output/nano_x16_photos"
