"""Your own COCO-format data: give four paths on the command line, as ``data.train_json=...``.

Category names are the phrases that the detector learns, so let them read like English.
"""

from detectron2.config import LazyCall as L
from dynamic_dino.data.datasets import load_coco_json
from dynamic_dino.data.loader import build_test_loader, build_train_loader
from dynamic_dino.data.mapper import TestMapper, TrainMapper
from dynamic_dino.evaluation.evaluator import DetectionEvaluator

data = dict(
    train_json="data/train.json",
    train_images="data/train",
    val_json="data/val.json",
    val_images="data/val",
)

dataloader = dict(
    train=L(build_train_loader)(
        dataset=L(load_coco_json)(
            json_file="${data.train_json}", image_root="${data.train_images}"
        ),
        mapper=L(TrainMapper)(
            dataset="${data.train_json}", size="${inference.size}", min_phrases=1, max_phrases=30
        ),
        total_batch_size=8,
        num_workers=1,
        seed=0,
    ),
    test=dict(
        val=L(build_test_loader)(
            dataset=L(load_coco_json)(
                json_file="${data.val_json}", image_root="${data.val_images}"
            ),
            mapper=L(TestMapper)(dataset="${data.val_json}", size="${inference.size}"),
            batch_size=8,
        )
    ),
    evaluator=dict(val=L(DetectionEvaluator)(dataset_name="${data.val_json}")),
)
