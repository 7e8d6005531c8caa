"""A few minutes of MoE-Tuning of the dense nano model: what `make demo` runs."""

from ..common.optim import cosine_schedule
from ..moe_tuning.nano_x16_stamps import (  # noqa: F401
    dataloader,
    inference,
    model,
    optimizer,
    train,
)

# 1,200 images / 8 images = 150 iterations
train.max_iter = 150
lr_multiplier = cosine_schedule(warmup=0.1)
train.output_dir = "output/demo"
train.log_period = 10
train.eval_period = 0
train.best_metric = None
