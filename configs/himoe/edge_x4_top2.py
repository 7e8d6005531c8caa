"""Table 6: 4 experts, one to a route: a query's 2 are those of the scene's 2 routes."""

from .edge_x16_top2 import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn.router.num_experts = 4
train.output_dir = "output/himoe/edge_x4_top2"
