"""nano x16-Top2 on glyphs: MoE-Tuning where the dense FFN is too narrow to remember all names."""

from ..common.moe import MOE_TUNING, experts, load_balance
from ..pretrain.nano_glyphs import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn = experts(model.decoder.layer.ffn, num_experts=16, top_k=2)
model.criterion.router_losses = [load_balance]

# 4,000 images * 1.6 epochs / 16 images = 400 iterations
train.max_iter = 400
optimizer.lr = 1e-3
train.trainable = MOE_TUNING
train.init_checkpoint = "output/nano_glyphs/model_final.pth"
train.init_except = []
train.output_dir = "output/nano_x16_glyphs"
