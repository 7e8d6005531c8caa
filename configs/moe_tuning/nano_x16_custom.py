"""nano x16-Top2, MoE-tuned on your own data; see common/data/custom.py."""

from ..common.data.custom import data, dataloader  # noqa: F401
from .nano_x16_stamps import inference, lr_multiplier, model, optimizer, train  # noqa: F401

# 8 images * 1,000 iterations
train.max_iter = 1000
train.output_dir = "output/nano_x16_custom"
train.eval_first = True  # the gain is seen at the end
train.best_metric = "val/AP"
