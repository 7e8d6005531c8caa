"""Table 5: 4 active experts per query."""

from .edge_x16_top2 import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn.router.top_k = 4
train.output_dir = "output/himoe/edge_x16_top4"
