"""Table 4, instance-only: flat routing of the queries, without a scene."""

from .edge_x16_top2 import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn.router.variant = "instance"
train.output_dir = "output/himoe/edge_instance_only"
