"""nano, dense, on glyphs with arbitrary names: where the width of the decoder's FFN matters."""

from ..common.data.glyphs import dataloader  # noqa: F401
from ..common.models.nano import inference, model
from ..common.optim import cosine_schedule, optimizer
from ..common.train import train

model.canvas = 128
inference.size = 128
model.query_selection.num_queries = 30
model.denoising.num_queries = 30
# Narrow, so that there is something to be gained by more of them.
model.decoder.layer.ffn.hidden = 128
# 4,000 images * 4 epochs / 16 images = 1,000 iterations
train.max_iter = 1000
lr_multiplier = cosine_schedule(warmup=0.05)
optimizer.lr = 1e-3
train.clip_grad.max_norm = 1.0
train.output_dir = "output/nano_glyphs"
train.eval_period = 0
train.checkpointer.period = 250
train.best_metric = "val/AP50"
