"""Fixed AP on LVIS v1 val, zero-shot: 19,809 images, 1203 names."""

from ..common.evaluation import LVIS, evaluate, evaluation, train  # noqa: F401
from ..moe_tuning.dynamic_dino_x16_top2 import inference, model  # noqa: F401

dataloader = evaluate({"lvis_val": "lvis_v1_val"}, LVIS)
train.output_dir = "output/eval/lvis_val"
