"""A gate of 1 with the renormalised gate's gradient: the detection loss reaches the router."""

from ..dynamic_dino_x16_top2 import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn.router.gate = "straight_through"
train.output_dir = "output/ablations/gate_straight_through"
