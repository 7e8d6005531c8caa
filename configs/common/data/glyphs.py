"""Glyphs with arbitrary names, to be learnt by heart. Make them with
``python -m dynamic_dino.data.synthetic.glyphs``.

Both splits ask for 120 names an image, the ones that it shows and others.
"""

from detectron2.config import LazyCall as L
from dynamic_dino.data.datasets import load_datasets
from dynamic_dino.data.loader import build_test_loader, build_train_loader
from dynamic_dino.data.mapper import TestMapper, TrainMapper
from dynamic_dino.evaluation.evaluator import DetectionEvaluator

dataloader = dict(
    train=L(build_train_loader)(
        dataset=L(load_datasets)(names="glyphs_train"),
        # features: folder of cached features, see python -m dynamic_dino.data.feature_cache --help
        mapper=L(TrainMapper)(
            dataset="glyphs_train",
            size="${inference.size}",
            min_phrases=120,
            max_phrases=120,
            features=None,
        ),
        total_batch_size=16,
        num_workers=1,
        seed=0,
    ),
    test=dict(
        val=L(build_test_loader)(
            dataset=L(load_datasets)(names="glyphs_val"),
            mapper=L(TestMapper)(
                dataset="glyphs_val", size="${inference.size}", prompt_names=120, features=None
            ),
            batch_size=16,
            num_workers=0,
        )
    ),
    evaluator=dict(val=L(DetectionEvaluator)(dataset_name="glyphs_val")),
)
