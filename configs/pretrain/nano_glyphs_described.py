"""nano at a quarter of its width, dense, on glyphs and their descriptions: it learns to see them,
and nano_glyphs starts from it."""

from ..common.data.glyphs import dataloader
from ..common.models.nano import inference, model
from ..common.optim import cosine_schedule, optimizer
from ..common.train import train

DIM = 64

dataloader.train.dataset.names = "glyphs_described_train"
dataloader.train.mapper.dataset = "glyphs_described_train"
dataloader.test.val.dataset.names = "glyphs_described_val"
dataloader.test.val.mapper.dataset = "glyphs_described_val"
dataloader.evaluator.val.dataset_name = "glyphs_described_val"

model.text_encoder.dim = DIM
model.enhancer.dim = DIM
model.enhancer.layer.fusion.dim = DIM
model.enhancer.layer.fusion.embed_dim = DIM
model.enhancer.layer.image.dim = DIM
model.enhancer.layer.image.ffn.dim = DIM
model.enhancer.layer.image.ffn.hidden = 64
model.enhancer.cross_scale.dim = DIM
model.enhancer.cross_scale.block.dim = DIM
model.query_selection.dim = DIM
model.query_selection.class_head.dim = DIM
model.query_selection.num_queries = 30
model.decoder.dim = DIM
model.decoder.layer.dim = DIM
model.decoder.layer.image_attention.dim = DIM
model.decoder.layer.image_attention.value_dim = DIM
model.decoder.layer.ffn.dim = DIM
model.decoder.layer.ffn.hidden = 64
model.decoder.class_head.dim = DIM
model.denoising.embed_dim = DIM
model.canvas = 128
model.max_phrases = 120
inference.size = 128

# 4,000 images * 4 epochs / 16 images = 1000 iterations
train.max_iter = 1000
lr_multiplier = cosine_schedule(warmup=0.05)
optimizer.lr = 2e-3
train.clip_grad.max_norm = 1.0
train.output_dir = "output/nano_glyphs_described"
train.eval_period = 0
train.checkpointer.period = 250
