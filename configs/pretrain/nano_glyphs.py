"""nano at a quarter of its width, dense, on glyphs: the decoder alone learns their names, so that
it counts how wide its FFNs are.

All else stays as it was for other names. By how much the width counts is measured by the sweep
"capacity" of benchmarks/ablations.py.
"""

from ..common.data.glyphs import dataloader  # noqa: F401
from .nano_glyphs_alias import inference, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.layer.ffn.hidden = 64

# 4,000 images * 3.2 epochs / 16 images = 800 iterations
train.max_iter = 800
train.trainable = ["decoder.*", "denoising.*", "query_selection.*", "text_encoder.proj.*"]
train.init_checkpoint = "output/nano_glyphs_alias/model_final.pth"
train.output_dir = "output/nano_glyphs"
