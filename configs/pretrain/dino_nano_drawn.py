"""Closed-set DINO at nano's size on the drawn shapes, for tests and first steps."""

from dynamic_dino.data.synthetic.drawn import NAMES

from ..common.data.drawn import dataloader
from ..common.models.dino_nano import inference, model
from ..common.optim import cosine_schedule, optimizer
from ..common.train import train

model.text_encoder.names = NAMES
model.canvas = 128
inference.size = 128
dataloader.train.mapper.max_phrases = None  # all 12 classes, always
# 256 images * 6.25 epochs / 4 images = 400 iterations
train.max_iter = 400
lr_multiplier = cosine_schedule(warmup=0.02)
optimizer.lr = 5e-4
train.clip_grad.max_norm = 1.0
train.output_dir = "output/dino_nano_drawn"
train.eval_period = 200
train.checkpointer.period = 200
train.best_metric = "val/AP50"
