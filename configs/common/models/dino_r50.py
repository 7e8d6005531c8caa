"""DINO with ResNet-50 and four levels (arXiv 2203.03605), for COCO's 80 classes: HI-MoE's base.

The closed-set sibling of gdino_tiny.py: no text encoder, no fusion, linear class heads, and
denoising by class. Other classes: set model.text_encoder.names to them, or to the data set that has
them. ImageNet weights are torchvision's, by way of the Hugging Face hub.
"""

from detectron2.config import LazyCall as L
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from dynamic_dino.data.class_names import class_vocabulary, count_classes
from dynamic_dino.modeling.attention import DeformableAttention
from dynamic_dino.modeling.backbone import Backbone
from dynamic_dino.modeling.decoder import Decoder, DecoderLayer
from dynamic_dino.modeling.deformable_enhancer import DeformableEnhancer, DeformableImageLayer
from dynamic_dino.modeling.detector import OpenVocabularyDetector
from dynamic_dino.modeling.enhancer import EnhancerLayer
from dynamic_dino.modeling.feed_forward import FeedForward
from dynamic_dino.modeling.heads import LinearHead
from dynamic_dino.modeling.losses.criterion import Criterion
from dynamic_dino.modeling.losses.denoising import ClassDenoising
from dynamic_dino.modeling.losses.matcher import HungarianMatcher
from dynamic_dino.modeling.neck import GroupNormNeck
from dynamic_dino.modeling.query_selection import QuerySelection

num_classes = L(count_classes)(names="${model.text_encoder.names}")

model = L(OpenVocabularyDetector)(
    backbone=L(Backbone)(
        name="resnet50.tv_in1k",
        weights="timm",
        freeze_norm=True,
        frozen_modules=["conv1", "layer1"],
    ),
    neck=L(GroupNormNeck)(in_channels=[512, 1024, 2048], dim=256, levels=4),
    text_encoder=L(class_vocabulary)(names=[c["name"] for c in COCO_CATEGORIES if c["isthing"]]),
    enhancer=L(DeformableEnhancer)(
        dim=256,
        levels=4,
        num_layers=6,
        layer=L(EnhancerLayer)(
            fusion=None,
            text=None,
            image=L(DeformableImageLayer)(
                dim=256,
                self_attention=L(DeformableAttention)(dim=256, heads=8, levels=4, points=4),
                ffn=L(FeedForward)(dim=256, hidden=2048),
            ),
        ),
    ),
    query_selection=L(QuerySelection)(
        dim=256, num_queries=900, class_head=L(LinearHead)(dim=256, num_classes=num_classes)
    ),
    decoder=L(Decoder)(
        dim=256,
        num_layers=6,
        layer=L(DecoderLayer)(
            dim=256,
            heads=8,
            image_attention=L(DeformableAttention)(dim=256, heads=8, levels=4, points=4),
            ffn=L(FeedForward)(dim=256, hidden=2048),
            attend_text=False,
        ),
        class_head=L(LinearHead)(dim=256, num_classes=num_classes),
        refine_normed=False,
        look_forward_twice=True,
    ),
    denoising=L(ClassDenoising)(num_classes=num_classes, embed_dim=256, num_queries=200),
    criterion=L(Criterion)(
        matcher=L(HungarianMatcher)(cost_class=2.0, cost_bbox=5.0, cost_giou=2.0),
        weight_class=1.0,
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
