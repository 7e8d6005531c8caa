"""Data sets, prompts, mappers and loaders."""

from .datasets import (
    get_metadata,
    load_coco_json,
    load_datasets,
    load_mdetr_json,
    load_odvg_jsonl,
    register_coco_json,
    register_mdetr_json,
    register_odvg_jsonl,
)
from .loader import build_test_loader, build_train_loader
from .mapper import TestMapper, TrainMapper, color_jitter, detr_augmentations, large_scale_jitter
from .odinw import ODINW13, ODINW35, odinw_names
from .prompts import PromptSampler

__all__ = [
    "ODINW13",
    "ODINW35",
    "PromptSampler",
    "TestMapper",
    "TrainMapper",
    "build_test_loader",
    "build_train_loader",
    "color_jitter",
    "detr_augmentations",
    "get_metadata",
    "large_scale_jitter",
    "load_coco_json",
    "load_datasets",
    "load_mdetr_json",
    "load_odvg_jsonl",
    "odinw_names",
    "register_coco_json",
    "register_mdetr_json",
    "register_odvg_jsonl",
]
