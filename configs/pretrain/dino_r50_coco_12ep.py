"""DINO (4 levels, ResNet-50) on COCO, 12 epochs: 49.0 AP in the paper (arXiv 2203.03605, Table 1).

Rates, schedule, batch, clipping and augmentation are those of DINO's code, but for a short warm-up.
"""

from ..common.data.coco import dataloader  # noqa: F401
from ..common.models.dino_r50 import inference, model  # noqa: F401
from ..common.optim import optimizer, step_schedule
from ..common.train import train

# 12 ep = 88,715 iterations * 16 images / 118,287 images; the rate falls after 11
train.max_iter = 88_715
lr_multiplier = step_schedule(milestones=[11 / 12], warmup=1000 / 88_715)
optimizer.lr = 1e-4
optimizer.params.lr_factors = {"backbone.*": 0.1}
train.output_dir = "output/dino_r50_coco_12ep"
train.eval_period = 7393  # an epoch
train.best_metric = "coco/AP"
