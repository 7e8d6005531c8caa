"""The paper's 1.56M training images (Table 7), zero-shot evaluation on COCO.

Objects365 v1 609k, V3Det 184k, GQA 621k, Flickr30k 149k: each image as often as any other. The
papers say nothing of prompts and augmentation; these are mmdetection's Grounding DINO's, with the
canvas fixed: DETR's crop without its scales, the names of an image and negatives up to 85, captions
as they are.
"""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from dynamic_dino.data.datasets import load_datasets
from dynamic_dino.data.loader import build_test_loader, build_train_loader
from dynamic_dino.data.mapper import TestMapper, TrainMapper
from dynamic_dino.evaluation.evaluator import DetectionEvaluator

dataloader = dict(
    train=L(build_train_loader)(
        dataset=L(load_datasets)(
            names=["objects365_v1_train", "v3det_train", "gqa_train", "flickr30k_train"]
        ),
        mapper=L(TrainMapper)(
            dataset="${..dataset.names}",
            size="${inference.size}",
            augmentations=L(T.RandomApply)(
                tfm_or_aug=L(T.RandomCrop)(crop_type="relative_range", crop_size=[0.5, 0.5]),
                prob=0.5,
            ),
            max_phrases=85,
            phrase_prompts=0.0,  # of captions, how many become their phrases in random order
            phrase_dropout=0.0,  # of these phrases, how many are left out
        ),
        total_batch_size=64,
        num_workers=8,
        seed=0,
        weights=None,  # by size; else one number for each data set
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
