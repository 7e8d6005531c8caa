"""Table 6: 8 experts."""

from .edge_x16_top2 import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn.router.num_experts = 8
train.output_dir = "output/himoe/edge_x8_top2"
