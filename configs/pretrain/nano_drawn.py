"""nano, dense, on the drawn shapes: the smallest recipe, for tests and first steps."""

from ..common.data.drawn import dataloader  # noqa: F401
from ..common.models.nano import inference, model
from ..common.optim import cosine_schedule, optimizer
from ..common.train import train

model.canvas = 128
inference.size = 128
# 32 images * 25 epochs / 4 images = 200 iterations
train.max_iter = 200
lr_multiplier = cosine_schedule(warmup=0.02)
optimizer.lr = 1e-3
train.clip_grad.max_norm = 1.0
train.output_dir = "output/nano_drawn"
train.eval_period = 100
train.checkpointer.period = 100
train.best_metric = "val/AP50"
