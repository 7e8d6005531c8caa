"""Grounding DINO 1.5 Edge: EfficientViT-L1, BERT-base, 900 queries, six decoder layers.

The papers give the totals only (178M, Dynamic-DINO's Table 8). Backbone, text encoder and decoder
follow from their names. Three cross-modal layers (fusion and text as wide as Grounding DINO's, the
image FFN as RT-DETR's on P5) and RT-DETR's cross-scale fusion fill the rest. That split is ours.
"""

from detectron2.config import LazyCall as L
from dynamic_dino.modeling.attention import BiAttention, DeformableAttention
from dynamic_dino.modeling.backbone import Backbone
from dynamic_dino.modeling.decoder import Decoder, DecoderLayer
from dynamic_dino.modeling.detector import OpenVocabularyDetector
from dynamic_dino.modeling.enhancer import (
    CrossScaleFusion,
    CSPRepLayer,
    EdgeEnhancer,
    EnhancerLayer,
    ImageLayer,
    TextLayer,
)
from dynamic_dino.modeling.feed_forward import FeedForward
from dynamic_dino.modeling.heads import ContrastiveHead
from dynamic_dino.modeling.losses.criterion import Criterion
from dynamic_dino.modeling.losses.matcher import HungarianMatcher
from dynamic_dino.modeling.query_selection import QuerySelection
from dynamic_dino.modeling.text import TextEncoder

model = L(OpenVocabularyDetector)(
    backbone=L(Backbone)(name="efficientvit_l1.r224_in1k", weights="timm"),  # 38.0M
    text_encoder=L(TextEncoder)(model="bert-base-uncased", dim=256, max_tokens=256),  # 109.5M
    enhancer=L(EdgeEnhancer)(
        dim=256,
        in_channels=[128, 256, 512],
        num_layers=3,
        layer=L(EnhancerLayer)(
            fusion=L(BiAttention)(dim=256, embed_dim=1024, heads=4),
            text=L(TextLayer)(dim=256, heads=4, ffn=1024),
            image=L(ImageLayer)(dim=256, heads=8, ffn=L(FeedForward)(dim=256, hidden=1024)),
        ),
        cross_scale=L(CrossScaleFusion)(dim=256, block=L(CSPRepLayer)(dim=256, depth=3)),
    ),
    query_selection=L(QuerySelection)(
        dim=256, num_queries=900, class_head=L(ContrastiveHead)(dim=256)
    ),
    decoder=L(Decoder)(
        dim=256,
        num_layers=6,
        layer=L(DecoderLayer)(
            dim=256,
            heads=8,
            image_attention=L(DeformableAttention)(dim=256, heads=8, levels=3, points=4),
            ffn=L(FeedForward)(dim=256, hidden=2048),
        ),
        class_head=L(ContrastiveHead)(dim=256),
    ),
    criterion=L(Criterion)(
        matcher=L(HungarianMatcher)(cost_class=2.0, cost_bbox=5.0, cost_giou=2.0),
        weight_class=2.0,
        weight_bbox=5.0,
        weight_giou=2.0,
        router_losses=[],
    ),
    canvas=640,
    max_detections=300,
)

# 640 x 640: the longest side becomes 640, the rest of the square is padding.
inference = dict(size=640)
