"""nano at a quarter of its width, dense, on glyphs: what is called how, its decoder alone learns,
so that it counts how wide its FFNs are.

All else, the text encoder too, stays as it was for descriptions. By how much the width counts is
measured by the sweep "capacity" of benchmarks/ablations.py.
"""

from ..common.data.glyphs import dataloader  # noqa: F401
from .nano_glyphs_described import inference, lr_multiplier, model, optimizer, train  # noqa: F401

# 4,000 images * 3.2 epochs / 16 images = 800 iterations
train.max_iter = 800
train.trainable = ["decoder.*", "denoising.*", "query_selection.*"]
train.init_checkpoint = "output/nano_glyphs_described/model_final.pth"
train.init_except = ["decoder.layers.*.ffn.*"]
train.output_dir = "output/nano_glyphs"
