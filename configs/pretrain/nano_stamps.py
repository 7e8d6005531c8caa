"""nano, dense, on Stamps: the base that MoE-Tuning starts from."""

from ..common.data.stamps import dataloader
from ..common.models.nano import inference, model  # noqa: F401
from ..common.optim import cosine_schedule, optimizer
from ..common.train import train

# 10,000 images * 7 epochs / 8 images = 8,750 iterations
train.max_iter = 8750
lr_multiplier = cosine_schedule(warmup=0.02)
optimizer.lr = 1e-3
train.clip_grad.max_norm = 1.0
train.output_dir = "output/nano_stamps"
train.eval_period = 1250
train.checkpointer.period = 250
train.best_metric = "val/AP50"
dataloader.train.total_batch_size = 8
