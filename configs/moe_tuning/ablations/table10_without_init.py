"""Table 10, without initialisation: new experts and router instead of the dense FFN's parts."""

from ..dynamic_dino_x16_top2 import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn.init_experts = False
model.decoder.layer.ffn.router.tied = False
train.output_dir = "output/ablations/table10_without_init"
