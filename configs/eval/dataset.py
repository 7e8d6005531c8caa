"""Any data set: ``evaluation.dataset`` is a registered name or the path of a COCO JSON file, whose
images are looked for relative to its folder."""

from ..common.evaluation import evaluate, evaluation, train
from ..moe_tuning.dynamic_dino_x16_top2 import inference, model  # noqa: F401

evaluation["dataset"] = "coco_2017_val"
dataloader = evaluate({"dataset": "${evaluation.dataset}"})
train.output_dir = "output/eval/dataset"
