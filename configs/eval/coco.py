"""COCO AP on val2017, zero-shot, all 80 names in one prompt."""

from ..common.evaluation import evaluate, evaluation, train  # noqa: F401
from ..moe_tuning.dynamic_dino_x16_top2 import inference, model  # noqa: F401

dataloader = evaluate({"coco": "coco_2017_val"})
train.output_dir = "output/eval/coco"
