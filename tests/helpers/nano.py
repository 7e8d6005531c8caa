"""The nano detector with random heads, and samples with a few drawn shapes: fixtures that a
folder's conftest.py imports."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from dynamic_dino.config import load_config
from dynamic_dino.data.synthetic.drawn import NAMES, draw_image
from dynamic_dino.modeling.prompt import Prompt

RECIPE = Path(__file__).parents[2] / "configs/pretrain/nano_drawn.py"


@pytest.fixture(scope="session")
def nano_config():
    return load_config(RECIPE)


@pytest.fixture(scope="session")
def _nano(nano_config):
    model = instantiate(nano_config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # nothing stays at zero, where mistakes would not show
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


@pytest.fixture
def nano(_nano):
    """A copy to be changed at will. 128 pixels, real towers, which are shared."""
    frozen = {id(p): p for p in _nano.parameters() if not p.requires_grad}
    model = copy.deepcopy(_nano, frozen)
    assert not model.text_encoder._phrases
    return model


@pytest.fixture
def draw():
    return draw_sample


def draw_sample(phrases: int = 6, objects: bool = True, scale: tuple[int, int] = (1, 1)) -> dict:
    """A mapped sample of about 128 x 128 pixels that asks for all of its shapes and others.

    scale: (rows, columns) of the original image per row and column of the sample.
    """
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    picture, drawn = draw_image(rng, 128)
    drawn = drawn if objects else []
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    h, w = image.shape[1:]
    shown = list(dict.fromkeys(label for label, _ in drawn))
    others = [label for label in rng.permutation(len(NAMES)).tolist() if label not in shown]
    asked = rng.permutation([*shown, *others][: max(phrases, len(shown))]).tolist()
    instances = Instances((h, w))
    boxes = torch.tensor([box for _, box in drawn], dtype=torch.float32).view(-1, 4)
    instances.gt_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
    instances.gt_classes = torch.tensor([asked.index(label) for label, _ in drawn]).long()
    return {
        "image": image,
        "image_size": (h, w),
        "height": h * scale[0],
        "width": w * scale[1],
        "file_name": "drawn.png",
        "prompt": Prompt.from_phrases([NAMES[label] for label in asked]),
        "instances": instances,
    }
