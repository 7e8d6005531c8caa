"""Table 9 at nano's size: experts in the image FFN of the enhancer too."""

from ..common.moe import experts
from .nano_x16_stamps import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.enhancer.layer.image.ffn = experts(model.enhancer.layer.image.ffn, num_experts=16, top_k=2)
train.output_dir = "output/nano_encoder_decoder_stamps"
