"""COCO 2017, closed set: every image is asked for all 80 names. DETR's multi-scale augmentation."""

from detectron2.config import LazyCall as L
from dynamic_dino.data.datasets import load_datasets
from dynamic_dino.data.loader import build_test_loader, build_train_loader
from dynamic_dino.data.mapper import TestMapper, TrainMapper, detr_augmentations
from dynamic_dino.evaluation.evaluator import DetectionEvaluator

dataloader = dict(
    train=L(build_train_loader)(
        dataset=L(load_datasets)(names="coco_2017_train"),
        mapper=L(TrainMapper)(
            dataset="coco_2017_train",
            size=None,
            augmentations=L(detr_augmentations)(),
            max_phrases=None,
        ),
        total_batch_size=16,
        num_workers=8,
        seed=0,
        filter_empty=False,  # as DINO's code
    ),
    test=dict(
        coco=L(build_test_loader)(
            dataset=L(load_datasets)(names="coco_2017_val"),
            mapper=L(TestMapper)(dataset="coco_2017_val", size="${inference.size}"),
            batch_size=4,
            num_workers=4,
        )
    ),
    evaluator=dict(coco=L(DetectionEvaluator)(dataset_name="coco_2017_val")),
)
