"""Drawn shapes, tiny detectors with random weights, and collections made by hand."""

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from dynamic_dino.analysis.collect import Collection, LayerCounts
from dynamic_dino.config import load_config
from dynamic_dino.data.datasets import register_builtin
from dynamic_dino.data.synthetic.drawn import write_drawn_dataset
from dynamic_dino.evaluation.coco import read_ground_truth
from dynamic_dino.evaluation.predictions import DatasetPredictions
from dynamic_dino.files import configs_folder


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """drawn_val: 10 pictures of 64 pixels."""
    root = tmp_path_factory.mktemp("datasets")
    write_drawn_dataset(root, 10, 64, seed=3, split="val")
    register_builtin(root)
    yield root
    register_builtin()


@pytest.fixture(scope="session")
def tiny():
    """tiny("moe_tuning/nano_x16_drawn.py", "model.x=1", ...) -> model, config: 64 pixels, random
    weights, none of them zero."""

    def build(recipe: str, *overrides: str):
        sizes = ("model.canvas=64", "inference.size=64", "model.query_selection.num_queries=30")
        cfg = load_config(configs_folder() / recipe, [*sizes, *overrides])
        model = instantiate(cfg.model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    scale = 0.3 if ".router." in name else 0.02
                    parameter.add_(torch.randn_like(parameter), alpha=scale)
        return model.eval(), cfg

    return build


@pytest.fixture(scope="session")
def x4(drawn, tiny):
    """A nano with four experts, and its config."""
    return tiny("moe_tuning/nano_x16_drawn.py", "model.decoder.layer.ffn.router.num_experts=4")


@pytest.fixture
def scene(rng):
    """scene() -> a `Collection` of random objects, detections and experts (two layers, K = 2)."""

    def build(images: int = 12, classes: int = 4, experts: int = 5) -> Collection:
        truth = {
            "images": [{"id": 7 * i + 1} for i in range(images)],
            "categories": [{"id": 3 * c + 2, "name": f"name {c}"} for c in range(classes)],
            "annotations": [],
        }
        category_ids = [c["id"] for c in truth["categories"]]
        parts = []
        for image in truth["images"]:
            boxes, names = [], []
            for _ in range(rng.integers(0, 7)):
                box = [*rng.uniform(0, 150, 2), *rng.uniform(8, 90, 2)]
                category = int(rng.choice(category_ids))
                truth["annotations"].append(
                    {
                        "image_id": image["id"],
                        "category_id": category,
                        "bbox": box,
                        "iscrowd": int(rng.random() < 0.1),
                    }
                )
                for _ in range(rng.integers(0, 4)):
                    boxes.append(np.array(box) * (1 + rng.normal(0, 0.06, 4)))
                    wrong = rng.random() < 0.2
                    names.append(int(rng.choice(category_ids)) if wrong else category)
            for _ in range(rng.integers(0, 12)):
                boxes.append(np.array([*rng.uniform(0, 150, 2), *rng.uniform(8, 90, 2)]))
                names.append(int(rng.choice(category_ids)))
            scores = np.sort(rng.random(len(boxes)))[::-1]
            order = rng.permutation(len(boxes))
            parts.append(
                DatasetPredictions(
                    np.full(len(boxes), image["id"]),
                    np.array(names, np.int64)[order],
                    np.array(boxes).reshape(-1, 4)[order],
                    scores,
                )
            )
        predictions = DatasetPredictions.cat(parts)
        taken = rng.random((len(predictions), 2, experts)).argsort(-1)[..., :2]
        layers = [
            LayerCounts(f"decoder {n}", rng.integers(1, 9, experts), rng.integers(0, 9, (5, 5)))
            for n in range(2)
        ]
        return Collection(
            "made by hand",
            layers,
            [],
            predictions,
            np.sort(taken, -1).astype(np.int16),
            {image["id"]: "none.png" for image in truth["images"]},
            read_ground_truth(truth),
            {c["id"]: c["name"] for c in truth["categories"]},
        )

    return build
