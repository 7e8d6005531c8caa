"""nano, dense, on Stamps: the base that MoE-Tuning starts from."""

from ..common.data.stamps import dataloader
from ..common.models.nano import inference, model  # noqa: F401
from ..common.optim import cosine_schedule, optimizer
from ..common.train import train

# 10,000 images * 5 epochs / 8 images = 6,250 iterations
train.max_iter = 6250
lr_multiplier = cosine_schedule(warmup=0.02)
optimizer.lr = 1e-3
train.clip_grad.max_norm = 1.0
train.output_dir = "output/nano_stamps"
train.eval_period = 2500
train.checkpointer.period = 500
train.best_metric = "val/AP50"
dataloader.train.total_batch_size = 8
