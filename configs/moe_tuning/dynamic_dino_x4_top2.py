"""Table 8: Dynamic-DINO x4-Top2, 2 copies of each FFN cut in two; 184M parameters."""

from .dynamic_dino_x16_top2 import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn.router.num_experts = 4
train.output_dir = "output/dynamic_dino_x4_top2"
