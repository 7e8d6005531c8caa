"""Fixed AP on LVIS v1 minival, zero-shot: 4,809 images of COCO's val2017, 1203 names."""

from ..common.evaluation import LVIS, evaluate, evaluation, train  # noqa: F401
from ..moe_tuning.dynamic_dino_x16_top2 import inference, model  # noqa: F401

dataloader = evaluate({"lvis_minival": "lvis_v1_minival"}, LVIS)
train.output_dir = "output/eval/lvis_minival"
