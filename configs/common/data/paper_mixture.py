"""The paper's 1.56M training images (Table 7), zero-shot evaluation on COCO.

Objects365 v1 609k, V3Det 184k, GQA 621k, Flickr30k 149k.
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
            # DETR's crop, without its scales: the canvas is fixed
            augmentations=L(T.RandomApply)(
                tfm_or_aug=L(T.RandomCrop)(crop_type="relative_range", crop_size=[0.5, 0.5]),
                prob=0.5,
            ),
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
