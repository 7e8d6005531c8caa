"""Grounding DINO's config.json, as transformers writes it, and our recipes' `model`: both ways."""

from __future__ import annotations

import json
from pathlib import Path

from detectron2.config import LazyConfig
from omegaconf import DictConfig
from torch import nn
from transformers import (
    GroundingDinoConfig,
    MMGroundingDinoConfig,
    PretrainedConfig,
    SwinConfig,
)

from ..files import configs_folder
from ..modeling.deformable_enhancer import DeformableEnhancer
from ..modeling.detector import OpenVocabularyDetector
from ..modeling.feed_forward import FeedForward

FAMILIES = {"grounding-dino": "gdino", "mm-grounding-dino": "mm_gdino"}
CONFIGS = {"grounding-dino": GroundingDinoConfig, "mm-grounding-dino": MMGroundingDinoConfig}
# Values that no public model departs from, and that ours has built in.
FIXED = {
    "two_stage": True,
    "embedding_init_target": True,
    "position_embedding_type": "sine",
    "activation_function": "relu",
    "layer_norm_eps": 1e-5,
    "query_dim": 4,
}
FIXED_SWIN = {
    "patch_size": 4,
    "num_channels": 3,
    "hidden_act": "gelu",
    "use_absolute_embeddings": False,
    "layer_norm_eps": 1e-5,
    "out_indices": [2, 3, 4],
}
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a directory; raises FileNotFoundError or ValueError if it is none of ours."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is no model of transformers")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): fetch it again") from error
    # Before transformers looks at it: a model of another type may bring code of its own, which
    # AutoConfig offers to run.
    kind = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"{folder} is a {str(kind)[:60]} model; what can be loaded are "
            f"{' and '.join(FAMILIES)} models"
        )
    try:
        return CONFIGS[kind].from_dict(content)
    except Exception as error:  # of whatever type transformers' checks are
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} can't be read ({reason}): fetch it again") from error


def detector_config(config: PretrainedConfig, folder: Path | None = None) -> DictConfig:
    """`model` and `inference`, as of a recipe, for a config of transformers.

    Args:
        folder: where its tokenizer is; without one, BERT's.

    Raises:
        ValueError: the config asks for something that our modules don't do.
    """
    swin, bert = config.backbone_config, config.text_config
    if swin is None or swin.model_type != "swin" or bert.model_type != "bert":
        raise ValueError("only Swin backbones and BERT text encoders can be loaded")
    for part, fixed in ((config, FIXED), (swin, FIXED_SWIN)):
        for name, value in fixed.items():
            found = getattr(part, name)
            found = list(found) if isinstance(value, list) else found
            if found != value:
                raise ValueError(f"{part.model_type} config: {name}={found!r}, only {value!r} fits")
    dim, heads = config.d_model, config.encoder_attention_heads
    path = configs_folder() / f"common/models/{FAMILIES[config.model_type]}_tiny.py"
    cfg = LazyConfig.load(str(path))
    model = cfg.model

    model.backbone.options.update(
        embed_dim=swin.embed_dim,
        depths=list(swin.depths),
        num_heads=list(swin.num_heads),
        window_size=swin.window_size,
        mlp_ratio=swin.mlp_ratio,
        qkv_bias=swin.qkv_bias,
        drop_path_rate=swin.drop_path_rate,
    )
    model.neck.update(
        in_channels=[swin.embed_dim * 2**i for i in (1, 2, 3)],
        dim=dim,
        levels=config.num_feature_levels,
    )
    model.text_encoder.update(
        dim=dim,
        max_tokens=config.max_text_len,
        config={
            name: getattr(bert, name)
            for name in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "hidden_act",
                "max_position_embeddings",
                "type_vocab_size",
                "layer_norm_eps",
            )
        },
    )
    if folder is not None and any((folder / name).is_file() for name in TOKENIZER_FILES):
        model.text_encoder.tokenizer = str(folder)

    enhancer, layer = model.enhancer, model.enhancer.layer
    enhancer.update(
        dim=dim,
        levels=config.num_feature_levels,
        num_layers=config.encoder_layers,
        temperature=float(config.positional_embedding_temperature),
    )
    layer.fusion.update(
        dim=dim,
        embed_dim=config.encoder_ffn_dim // 2,
        heads=heads // 2,
        drop_path=config.fusion_droppath,
    )
    layer.text.update(dim=dim, heads=heads // 2, ffn=config.encoder_ffn_dim // 2)
    layer.image.dim = dim
    layer.image.ffn.update(dim=dim, hidden=config.encoder_ffn_dim)
    for attention, attention_heads, points in (
        (layer.image.self_attention, heads, config.encoder_n_points),
        (
            model.decoder.layer.image_attention,
            config.decoder_attention_heads,
            config.decoder_n_points,
        ),
    ):
        attention.update(
            dim=dim, heads=attention_heads, levels=config.num_feature_levels, points=points
        )

    model.query_selection.update(dim=dim, num_queries=config.num_queries)
    model.query_selection.class_head.dim = dim
    decoder = model.decoder
    decoder.update(dim=dim, num_layers=config.decoder_layers)
    decoder.class_head.dim = dim
    decoder.layer.update(dim=dim, heads=config.decoder_attention_heads)
    decoder.layer.ffn.update(dim=dim, hidden=config.decoder_ffn_dim)
    # Transformers 4 has no such setting for MM-Grounding-DINO.
    decoder.separate_heads = not getattr(config, "decoder_bbox_embed_share", True)
    return cfg


def transformers_config(model: OpenVocabularyDetector) -> PretrainedConfig:
    """The config of transformers for a dense detector of the full Grounding DINO variant.

    Raises:
        ValueError: transformers has no such model.
    """
    layers = [*getattr(model.enhancer, "layers", []), *model.decoder.layers]
    ffns = [layer.image.ffn if hasattr(layer, "image") else layer.ffn for layer in layers]
    if not isinstance(model.enhancer, DeformableEnhancer) or not model.backbone.out_norm:
        raise ValueError(
            "only the full Grounding DINO variant (gdino_*) has a twin in transformers"
        )
    if not all(isinstance(ffn, FeedForward) for ffn in ffns):
        raise ValueError("a model with experts has no twin in transformers: export a dense one")

    body, encoder, decoder = model.backbone.body, model.enhancer.layers[0], model.decoder.layers[0]
    stages = [body[f"layers_{i}"] for i in range(4)]
    swin = SwinConfig(
        embed_dim=body.patch_embed.proj.out_channels,
        depths=[len(stage.blocks) for stage in stages],
        num_heads=[stage.blocks[0].attn.num_heads for stage in stages],
        window_size=stages[0].blocks[0].window_size[0],
        mlp_ratio=stages[0].blocks[0].mlp_ratio,
        qkv_bias=stages[0].blocks[0].attn.qkv.bias is not None,
        out_indices=FIXED_SWIN["out_indices"],
    )
    separate = isinstance(model.decoder.box_head, nn.ModuleList)
    scaled = model.query_selection.class_head.bias is not None
    kind = MMGroundingDinoConfig if scaled else GroundingDinoConfig
    return kind(
        backbone_config=swin,
        text_config=model.text_encoder.body.config,
        d_model=model.text_encoder.dim,
        num_queries=model.query_selection.num_queries,
        num_feature_levels=len(model.enhancer.level_embed),
        max_text_len=model.text_encoder.max_tokens,
        positional_embedding_temperature=int(model.enhancer.temperature),
        encoder_layers=len(model.enhancer.layers),
        encoder_ffn_dim=encoder.image.ffn.linear1.out_features,
        encoder_attention_heads=encoder.image.self_attention.heads,
        encoder_n_points=encoder.image.self_attention.points,
        decoder_layers=len(model.decoder.layers),
        decoder_ffn_dim=decoder.ffn.linear1.out_features,
        decoder_attention_heads=decoder.self_attention.heads,
        decoder_n_points=decoder.image_attention.points,
        decoder_bbox_embed_share=not separate,
        **({"decoder_cls_embed_share": not separate} if scaled else {}),
    )
