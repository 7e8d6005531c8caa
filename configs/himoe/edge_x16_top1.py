"""Table 5: 1 active expert per query."""

from .edge_x16_top2 import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn.router.top_k = 1
train.output_dir = "output/himoe/edge_x16_top1"
