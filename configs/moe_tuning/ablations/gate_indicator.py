"""The gate as the paper writes it: 1 for the chosen experts, no gradient to the router."""

from ..dynamic_dino_x16_top2 import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn.gate = "indicator"
train.output_dir = "output/ablations/gate_indicator"
