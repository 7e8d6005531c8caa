"""nano at a quarter of its width, without FFNs in its decoder, on glyphs by their other names: it
learns to find glyphs and to tell them apart, and nano_glyphs starts from it."""

from ..common.data.glyphs import dataloader
from ..common.models.nano import inference, model
from ..common.optim import cosine_schedule, optimizer
from ..common.train import train

DIM = 64

dataloader.train.dataset.names = "glyphs_alias_train"
dataloader.train.mapper.dataset = "glyphs_alias_train"
dataloader.test.val.dataset.names = "glyphs_alias_val"
dataloader.test.val.mapper.dataset = "glyphs_alias_val"
dataloader.evaluator.val.dataset_name = "glyphs_alias_val"

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
model.decoder.layer.ffn.hidden = 0
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
train.output_dir = "output/nano_glyphs_alias"
train.eval_period = 0
train.checkpointer.period = 250
