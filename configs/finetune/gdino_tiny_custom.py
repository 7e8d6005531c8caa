"""Grounding DINO (Swin-T), fine-tuned on your own COCO-format data; see common/data/custom.py.

Starts from the public weights. Where the hub can't be reached, download them elsewhere and set
train.init_checkpoint=hf:DIRECTORY. The text encoder stays as it is, or other words would be
forgotten; rates are those of mmdet's example (1e-4 for 4 images, the backbone a tenth of it).
"""

from ..common.data.custom import data, dataloader  # noqa: F401
from ..common.models.gdino_tiny import inference, model  # noqa: F401
from ..common.optim import cosine_schedule, optimizer
from ..common.train import train

model.text_encoder.frozen = True
dataloader.train.total_batch_size = 4
dataloader.test.val.batch_size = 1

# 4 images * 5,000 iterations
train.max_iter = 5000
train.init_checkpoint = "hf:IDEA-Research/grounding-dino-tiny"
lr_multiplier = cosine_schedule(warmup=100 / 5000)
optimizer.lr = 1e-4
optimizer.params.lr_factors = {"backbone.*": 0.1}
train.output_dir = "output/gdino_tiny_custom"
train.eval_period = 500
train.best_metric = "val/AP"
