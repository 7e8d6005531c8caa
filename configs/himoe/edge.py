"""HI-MoE's routing on the Edge detector, by MoE-Tuning of the dense base: its default router.

Each decoder FFN becomes 16 whole copies; of 4 scene routes 2 are kept, of their 8 experts 2 per
query.
Schedule, data and what trains are Dynamic-DINO's, so that the two compare.
"""

from ..common.moe import diversity, hierarchical, squared_balance
from ..moe_tuning.dynamic_dino_x16_top2 import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn = hierarchical(model.decoder.layer.ffn)
model.criterion.router_losses = [squared_balance, diversity]
train.output_dir = "output/himoe/edge"
