"""Stamps, the embedded data set, at nano's 320 pixels. Make it with
``python -m dynamic_dino.data.synthetic.stamps``.

val and val_novel ask for 30 names an image, the ones that it shows and others (federated); the
photos of val_real are asked for 30 as well.
"""

from detectron2.config import LazyCall as L
from dynamic_dino.data.datasets import load_datasets
from dynamic_dino.data.loader import build_test_loader, build_train_loader
from dynamic_dino.data.mapper import TestMapper, TrainMapper
from dynamic_dino.evaluation.evaluator import DetectionEvaluator

dataloader = dict(
    train=L(build_train_loader)(
        dataset=L(load_datasets)(names="stamps_train"),
        # features: folder of cached features, see python -m dynamic_dino.data.feature_cache --help
        mapper=L(TrainMapper)(
            dataset="stamps_train",
            size="${inference.size}",
            min_phrases=10,
            max_phrases=30,
            features=None,
        ),
        total_batch_size=8,
        num_workers=1,
        seed=0,
    ),
    test={
        name: L(build_test_loader)(
            dataset=L(load_datasets)(names=f"stamps_{name}"),
            mapper=L(TestMapper)(
                dataset=f"stamps_{name}", size="${inference.size}", prompt_names=30, features=None
            ),
            batch_size=8,
            num_workers=0,
        )
        for name in ("val", "val_novel", "val_real")
    },
    evaluator={
        name: L(DetectionEvaluator)(dataset_name=f"stamps_{name}")
        for name in ("val", "val_novel", "val_real")
    },
)
