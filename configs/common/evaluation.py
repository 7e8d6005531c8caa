"""What the evaluations of configs/eval share: loaders and evaluators of registered data sets.

They hold no model of their own: each takes the paper's, and ``--model RECIPE`` puts another in its
place. What a protocol asks of the detector stands with its evaluator.
"""

from detectron2.config import LazyCall as L
from dynamic_dino.data.datasets import load_datasets
from dynamic_dino.data.loader import build_test_loader
from dynamic_dino.data.mapper import TestMapper
from dynamic_dino.data.odinw import MINIVAL, PROMPTS, odinw_names
from dynamic_dino.evaluation.evaluator import DetectionEvaluator

from .train import train

train.init_checkpoint = "output/dynamic_dino_x16_top2/model_final.pth"
train.amp.enabled = False  # figures in full precision don't depend on the GPU

evaluation = dict(batch_size=8, num_workers=4)  # of every process

# Fixed AP as MDETR, GLIP and Grounding DINO take it: 1203 names in chunks of 40, the 300 best boxes
# of each chunk.
LVIS = dict(max_phrases=40, max_detections=300, max_detections_per="chunk")


def evaluate(
    datasets: dict[str, str], detector: dict | None = None, prompt_names: dict | None = None
) -> dict:
    """`dataloader` of test sets only: their names -> registered data sets. `prompt_names`: what the
    `TestMapper` of a test set asks for; "all" names where nothing is said."""
    asked = prompt_names or {}
    return dict(
        test={
            name: L(build_test_loader)(
                dataset=L(load_datasets)(names=dataset),
                mapper=L(TestMapper)(
                    dataset=dataset,
                    size="${inference.size}",
                    prompt_names=asked.get(name, "all"),
                ),
                batch_size="${evaluation.batch_size}",
                num_workers="${evaluation.num_workers}",
            )
            for name, dataset in datasets.items()
        },
        evaluator={
            name: L(DetectionEvaluator)(dataset_name=dataset, detector=detector or {})
            for name, dataset in datasets.items()
        },
    )


def evaluate_odinw(title: str, sets: tuple[str, ...]) -> dict:
    """Every set by its names and, where GLIP has prompts for it, by these too, and both means."""
    datasets, means = {}, {}
    for prompts in (False, True):
        tests = [f"{name}_prompts" if prompts and name in PROMPTS else name for name in sets]
        for test, name in zip(tests, sets, strict=True):
            split = "minival" if name in MINIVAL else "val"
            datasets[test] = odinw_names([name], split, prompts)[0]
        means[f"{title}, prompts" if prompts else title] = tests
    return evaluate(datasets) | dict(skip_missing=True, means=means)
