"""Your own data, in any format that docs/data.md lists. Give the file or folder on the command
line, as ``data.source=...``: its parts train and val are taken, or a fifth of the images is drawn
for val. Or give both, ``data.train_json=...`` and ``data.val_json=...``, a file or folder each.

Category names and phrases are what the detector learns, so let them read like English. To keep
what the model knows, mix other data sets in, ``data.extra=[coco_2017_train,gqa_train]``, and say
how many of the samples come from each, yours first: ``data.weights=[2,1,1]`` (default: by size).
Where some names are rare, ``dataloader.train.repeat_threshold=0.05`` draws their images more often.
"""

from detectron2.config import LazyCall as L
from dynamic_dino.data.datasets import load_own_data
from dynamic_dino.data.loader import build_test_loader, build_train_loader
from dynamic_dino.data.mapper import TestMapper, TrainMapper
from dynamic_dino.evaluation.evaluator import DetectionEvaluator

data = dict(
    source="data",
    train_json="${data.source}:train",
    train_images=None,  # folder of the images; default: where the annotations are
    val_json="${data.source}:val",
    val_images=None,
    extra=[],
    weights=None,
)

dataloader = dict(
    train=L(build_train_loader)(
        dataset=L(load_own_data)(
            file="${data.train_json}", image_root="${data.train_images}", extra="${data.extra}"
        ),
        mapper=L(TrainMapper)(
            dataset=["${data.train_json}", "${data.extra}"],
            size="${inference.size}",
            min_phrases=1,
            max_phrases=30,
        ),
        total_batch_size=8,
        num_workers=1,
        seed=0,
        weights="${data.weights}",
        repeat_threshold=None,  # Detectron2's repeat factors: of names that fewer images show
    ),
    test=dict(
        val=L(build_test_loader)(
            dataset=L(load_own_data)(file="${data.val_json}", image_root="${data.val_images}"),
            mapper=L(TestMapper)(dataset="${data.val_json}", size="${inference.size}"),
            batch_size=8,
        )
    ),
    evaluator=dict(val=L(DetectionEvaluator)(dataset_name="${data.val_json}")),
)
