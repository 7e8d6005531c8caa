"""Photos and Stamps in one mixture, at nano's 320 pixels. ``python -m dynamic_dino.data.photos``
brings the photos, ``python -m dynamic_dino.data.synthetic.stamps`` makes Stamps.

``data.train`` and ``data.weights`` say what is mixed, and how much of the samples come from each;
whoever has only COCO's photos takes ``data.train=[photos_coco_train,stamps_train]
data.weights=[5,2]``. Scores: photos_coco_val asked for all 80 names (coco) and for those that a
photo shows (coco_present), and Stamps' val and val_real.
"""

from detectron2.config import LazyCall as L
from dynamic_dino.data.datasets import load_datasets
from dynamic_dino.data.loader import build_test_loader, build_train_loader
from dynamic_dino.data.mapper import TestMapper, TrainMapper, color_jitter, large_scale_jitter
from dynamic_dino.evaluation.evaluator import DetectionEvaluator

data = dict(
    train=[
        "photos_coco_train",
        "photos_groceries_train",
        "photos_airport_debris_train",
        "photos_animals25_train",
        "stamps_train",
    ],
    weights=[5, 1, 0.5, 1, 2],
)
PRESENT = 1  # a prompt of one name, or of all that the image shows
TESTS = {
    "coco": ("photos_coco_val", "all"),
    "coco_present": ("photos_coco_val", PRESENT),
    "val": ("stamps_val", 30),
    "val_real": ("stamps_val_real", 30),
}

dataloader = dict(
    train=L(build_train_loader)(
        dataset=L(load_datasets)(names="${data.train}"),
        mapper=L(TrainMapper)(
            dataset="${data.train}",
            size=None,  # the jitter chooses it
            augmentations=[
                L(color_jitter)(),
                L(large_scale_jitter)(size="${inference.size}", min_scale=0.5, max_scale=2.0),
            ],
            min_box_size=4.0,
            min_phrases=10,
            max_phrases=80,
        ),
        total_batch_size=4,
        num_workers=1,
        seed=0,
        weights="${data.weights}",
        # photos of a name that 5 of COCO's 493 show come sqrt(.05 / (5 / 493)) = 2.2 times as often
        repeat_threshold=0.05,
    ),
    test={
        name: L(build_test_loader)(
            dataset=L(load_datasets)(names=dataset),
            mapper=L(TestMapper)(
                dataset=dataset, size="${inference.size}", prompt_names=prompt_names
            ),
            batch_size=8,
            num_workers=0,
        )
        for name, (dataset, prompt_names) in TESTS.items()
    },
    evaluator={
        name: L(DetectionEvaluator)(dataset_name=dataset) for name, (dataset, _) in TESTS.items()
    },
)
