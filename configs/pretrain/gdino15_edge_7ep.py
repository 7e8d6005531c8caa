"""Pre-training of the dense base, Grounding DINO 1.5 Edge, as Dynamic-DINO reproduces it.

Learning rate, batch, negatives and augmentation are given by no paper; these are those of mmdet's
Grounding DINO on the same data (rate 1e-4 per 16 images, the encoders at a tenth of it).
"""

from ..common.data.paper_mixture import dataloader  # noqa: F401
from ..common.models.edge import inference, model  # noqa: F401
from ..common.optim import optimizer, step_schedule
from ..common.train import train

# 7 ep = 170,953 iterations * 64 images / 1,563,000 images
train.max_iter = 170_953
lr_multiplier = step_schedule(milestones=[19 / 30, 26 / 30], warmup=1000 / 170_953)
optimizer.lr = 4e-4
optimizer.params.lr_factors = {"backbone.*": 0.1, "text_encoder.body.*": 0.1}
train.output_dir = "output/gdino15_edge_7ep"
train.eval_period = 24_422  # an epoch
train.best_metric = "coco/AP"
