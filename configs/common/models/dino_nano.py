"""DINO at a size for two CPU cores: dino_r50.py with nano's backbone, which a PyPI package brings.

EfficientNet-lite0 is frozen, so its features can be cached while training. Set
model.text_encoder.names to the classes.
"""

from .dino_r50 import model
from .nano import inference  # noqa: F401
from .nano import model as nano

model.backbone = nano.backbone
model.neck.in_channels = [40, 112, 320]
model.enhancer.num_layers = 2
model.enhancer.layer.image.ffn.hidden = 512
model.query_selection.num_queries = 100
model.decoder.num_layers = 3
model.decoder.layer.ffn.hidden = 512
model.denoising.num_queries = 60
model.canvas = 320
model.size_divisor = 32
model.pad_images = True
model.max_detections = 100
