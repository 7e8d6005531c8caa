"""The gate as a softmax over the chosen experts, times k."""

from ..dynamic_dino_x16_top2 import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn.router.gate = "renormalized"
train.output_dir = "output/ablations/gate_renormalized"
