"""The control of nano_x16_stamps: the dense model, tuned for as long, on the same data in the same
order, with the same parameters free."""

from ..common.moe import FUSION, HEADS
from ..pretrain.nano_stamps import model  # noqa: F401  (dense)
from .nano_x16_stamps import (  # noqa: F401
    dataloader,
    inference,
    lr_multiplier,
    optimizer,
    train,
)

train.trainable = [*FUSION, "decoder.layers.*.ffn.*", *HEADS]
train.output_dir = "output/nano_dense_control_stamps"
