"""The shipped nano models load by name and detect in images of any size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, pairwise_iou
from dynamic_dino import load_detector
from dynamic_dino.files import PACKAGE
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.serving.shipped import EXAMPLE_NAMES, EXAMPLE_PROMPT, SHIPPED_MODELS


@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_a_shipped_model_loads_and_detects(name):
    weights = PACKAGE / "weights" / SHIPPED_MODELS[name].weights
    assert weights.stat().st_size <= 24 * 2**20
    detector = load_detector(name, device="cpu")
    layers = [m for m in detector.model.modules() if isinstance(m, MoEFeedForward)]
    assert len(layers) == (3 if name.endswith("x16") else 0)

    images = [np.random.randint(0, 256, size, np.uint8) for size in ((90, 160, 3), (50, 40, 3))]
    prompts = [["red apple", "horse"], ["hammer", "sheep", "cow"]]
    found = detector(images, prompts, threshold=0.0)
    for instances, image, phrases in zip(found, images, prompts, strict=True):
        assert 0 < len(instances) <= 100 and set(instances.phrases) <= set(phrases)
        boxes = instances.pred_boxes.tensor
        assert torch.isfinite(boxes).all() and (boxes >= 0).all()
        assert (boxes[:, 2] <= image.shape[1]).all() and (boxes[:, 3] <= image.shape[0]).all()


REAL = Path(__file__).parents[2] / "datasets/stamps/annotations/val_real.json"


@pytest.mark.skipif(not REAL.is_file(), reason="needs Stamps: make demo, or its first step")
@pytest.mark.parametrize("name", EXAMPLE_NAMES)
def test_the_default_model_answers_the_example(name):
    """At least one photo of the name has a box of this name on the object."""
    truth = json.loads(REAL.read_text())
    [category] = [c["id"] for c in truth["categories"] if c["name"] == name]
    files = {image["id"]: image["file_name"] for image in truth["images"]}
    detector = load_detector(device="cpu")
    for annotation in truth["annotations"]:
        if annotation["category_id"] != category:
            continue
        x, y, w, h = annotation["bbox"]
        photo = REAL.parents[1] / "val_real" / files[annotation["image_id"]]
        found = detector(photo, EXAMPLE_PROMPT)
        found = found[found.pred_classes == EXAMPLE_NAMES.index(name)]
        if len(found) and pairwise_iou(found.pred_boxes, Boxes([[x, y, x + w, y + h]])).max() > 0.5:
            return
    pytest.fail(f"no {name} is found in any photo of one")
