"""gdino_nano, dense, on Stamps, in minutes: Swin starts at random, so it only learns a little."""

from ..common.data.stamps import dataloader
from ..common.models.gdino_nano import inference, model  # noqa: F401
from ..common.optim import cosine_schedule, optimizer
from ..common.train import train

dataloader.train.total_batch_size = 4
for name in ("val_novel", "val_real"):
    del dataloader.test[name], dataloader.evaluator[name]

# 4 images * 400 iterations
train.max_iter = 400
lr_multiplier = cosine_schedule(warmup=0.1)
optimizer.lr = 1e-3
train.clip_grad.max_norm = 1.0
train.output_dir = "output/gdino_nano_stamps"
train.eval_period = 0
train.checkpointer.period = 50
