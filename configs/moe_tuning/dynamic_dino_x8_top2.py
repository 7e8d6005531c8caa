"""Table 8: Dynamic-DINO x8-Top2, 4 copies of each FFN cut in two; 197M parameters."""

from .dynamic_dino_x16_top2 import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn.router.num_experts = 8
train.output_dir = "output/dynamic_dino_x8_top2"
