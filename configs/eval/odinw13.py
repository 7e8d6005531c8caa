"""ODinW13, zero-shot: COCO AP of each set and their mean, by the sets' names and by GLIP's prompts.

Sets that aren't there are named and left out; a mean over fewer than 13 says so.
"""

from dynamic_dino.data.odinw import ODINW13

from ..common.evaluation import evaluate_odinw, evaluation, train  # noqa: F401
from ..moe_tuning.dynamic_dino_x16_top2 import inference, model  # noqa: F401

dataloader = evaluate_odinw("ODinW13", ODINW13)
train.output_dir = "output/eval/odinw13"
