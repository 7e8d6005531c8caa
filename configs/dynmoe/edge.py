"""DynMoE on the Edge detector, by MoE-Tuning of the dense base: top-any routing, adaptive experts.

Each decoder FFN becomes whole copies: 6 at the start, at most 8 (the paper's vision tasks), removed
and added every 200 iterations (the paper: 100-300). Schedule, data and what trains are
Dynamic-DINO's. To evaluate with k experts for every query (the paper's Table 3):
--eval-only model.decoder.layer.ffn.router.forced_k=2
"""

from ..common.moe import sparse_gating, top_any
from ..moe_tuning.dynamic_dino_x16_top2 import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.layer.ffn = top_any(model.decoder.layer.ffn)
model.criterion.router_losses = [sparse_gating]

train.adaptive_experts = dict(enabled=True, period=200, window=200)
train.output_dir = "output/dynmoe/edge"
