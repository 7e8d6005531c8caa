"""A few drawn shapes: the smallest data set that trains, for tests and first steps.

Make it with ``python -m dynamic_dino.data.synthetic.drawn``.
"""

from detectron2.config import LazyCall as L
from dynamic_dino.data.datasets import load_datasets
from dynamic_dino.data.loader import build_test_loader, build_train_loader
from dynamic_dino.data.mapper import TestMapper, TrainMapper
from dynamic_dino.evaluation.evaluator import DetectionEvaluator

dataloader = dict(
    train=L(build_train_loader)(
        dataset=L(load_datasets)(names="drawn_train"),
        mapper=L(TrainMapper)(dataset="drawn_train", size="${inference.size}", max_phrases=12),
        total_batch_size=4,
        num_workers=0,
        seed=0,
    ),
    test=dict(
        val=L(build_test_loader)(
            dataset=L(load_datasets)(names="drawn_val"),
            mapper=L(TestMapper)(dataset="drawn_val", size="${inference.size}"),
            batch_size=4,
        )
    ),
    evaluator=dict(val=L(DetectionEvaluator)(dataset_name="drawn_val")),
)
