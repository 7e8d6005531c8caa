"""The paper's 1.56M training images (Table 7), zero-shot evaluation on COCO.

Objects365 v1 609k, V3Det 184k, GQA 621k, Flickr30k 149k. Folders under ``DETECTRON2_DATASETS``;
GQA and Flickr30k in the ODVG format, one JSON object a line.
"""

import os

from detectron2.config import LazyCall as L
from dynamic_dino.data.datasets import load_coco_json, load_datasets, load_odvg_jsonl
from dynamic_dino.data.loader import build_test_loader, build_train_loader
from dynamic_dino.data.mapper import TestMapper, TrainMapper, detr_augmentations
from dynamic_dino.evaluation.evaluator import DetectionEvaluator

root = os.environ.get("DETECTRON2_DATASETS", "datasets")

dataloader = dict(
    train=L(build_train_loader)(
        dataset=[
            L(load_coco_json)(
                json_file=f"{root}/objects365_v1/annotations/objects365_train.json",
                image_root=f"{root}/objects365_v1/train",
                name="objects365_v1_train",
                bad_boxes="drop",
            ),
            L(load_coco_json)(
                json_file=f"{root}/v3det/annotations/v3det_2023_v1_train.json",
                image_root=f"{root}/v3det",
                name="v3det_train",
                bad_boxes="drop",
            ),
            L(load_odvg_jsonl)(
                jsonl_file=f"{root}/gqa/final_mixed_train_no_coco_vg.jsonl",
                image_root=f"{root}/gqa/images",
                name="gqa_train",
            ),
            L(load_odvg_jsonl)(
                jsonl_file=f"{root}/flickr30k/final_flickr_separateGT_train_vg.jsonl",
                image_root=f"{root}/flickr30k/flickr30k_images",
                name="flickr30k_train",
            ),
        ],
        mapper=L(TrainMapper)(
            dataset=["objects365_v1_train", "v3det_train"],
            size="${inference.size}",
            augmentations=L(detr_augmentations)(),
            max_phrases=85,
        ),
        total_batch_size=64,
        num_workers=8,
        seed=0,
    ),
    test=dict(
        coco=L(build_test_loader)(
            dataset=L(load_datasets)(names="coco_2017_val"),
            mapper=L(TestMapper)(dataset="coco_2017_val", size="${inference.size}"),
            batch_size=8,
            num_workers=4,
        )
    ),
    evaluator=dict(coco=L(DetectionEvaluator)(dataset_name="coco_2017_val")),
)
