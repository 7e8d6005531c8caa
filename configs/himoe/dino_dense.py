"""Table 4, dense: the base."""

from ..pretrain.dino_r50_coco_50ep import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

train.output_dir = "output/himoe/dino_dense"
