"""Table 4, dense: the base tuned for as long, on the same data, with the same parameters free."""

from ..common.moe import FUSION, HEADS
from ..pretrain.gdino15_edge_7ep import model  # noqa: F401  (dense)
from .edge import dataloader, inference, lr_multiplier, optimizer, train  # noqa: F401

train.trainable = [*FUSION, "decoder.layers.*.ffn.*", *HEADS]
train.output_dir = "output/himoe/edge_dense"
