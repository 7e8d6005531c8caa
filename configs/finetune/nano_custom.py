"""nano, dense, fine-tuned on your own data; see common/data/custom.py.

finetune.py takes the length from the number of photos, and caches what the frozen towers say.
"""

from ..common.data.custom import data, dataloader  # noqa: F401
from ..common.models.nano import inference, model  # noqa: F401
from ..common.optim import cosine_schedule, optimizer
from ..common.train import train

dataloader.train.total_batch_size = 4

# 4 images * 300 iterations
train.max_iter = 300
train.init_checkpoint = "package:dynamic_dino/weights/nano_dense.safetensors"
lr_multiplier = cosine_schedule(warmup=0.1)
optimizer.lr = 2e-4
train.clip_grad.max_norm = 1.0
train.output_dir = "output/nano_custom"
train.eval_first = True  # the gain is seen at the end
train.best_metric = "val/AP"
