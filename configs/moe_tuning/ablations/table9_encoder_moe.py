"""Table 9: MoE in the image FFN of the enhancer too, at 640 x 640.

The table's caption says 800 x 1333, but its rows "dense" and "decoder" are those of Tables 8 and 10
at 640, digit by digit. At the caption's size: inference.size=[800,1333] model.canvas=null
"""

from ...common.moe import experts
from ..dynamic_dino_x16_top2 import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.enhancer.layer.image.ffn = experts(model.enhancer.layer.image.ffn, num_experts=16, top_k=2)
train.output_dir = "output/ablations/table9_encoder_moe"
