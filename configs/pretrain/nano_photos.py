"""nano, dense, on photos and Stamps: from the weights that know Stamps alone.

EfficientNet-lite0 stays frozen. The variant ``unfrozen`` goes on from here and trains it too, at a
tenth of the rate, its batch norms excepted, and ends no better.
"""

from ..common.data.photos import data, dataloader  # noqa: F401
from ..common.models.nano import inference, model  # noqa: F401
from ..common.optim import cosine_schedule, optimizer
from ..common.train import train

model.backbone.freeze_norm = True
model.max_phrases = 80  # COCO's names are one prompt

# 5/9.5 of 4 images * 6,000 iterations: each of COCO's 490 photos with boxes comes 26 times
train.max_iter = 6000
lr_multiplier = cosine_schedule(warmup=0.02)
optimizer.lr = 6e-4
optimizer.params.lr_factors = {"backbone.*": 0.1}
train.clip_grad.max_norm = 1.0
train.init_checkpoint = "package:dynamic_dino/weights/nano_dense.safetensors"
train.output_dir = "output/nano_photos"
train.eval_period = 2000
train.checkpointer.period = 250
train.best_metric = "coco/AP50"
