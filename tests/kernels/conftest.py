from pathlib import Path

import pytest
import torch
from helpers.interpreter import lighten_interpreter

FOLDER = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there, Triton's interpreter runs
if DEVICE == "cpu":
    lighten_interpreter()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(FOLDER):
            item.add_marker(pytest.mark.kernels)


@pytest.fixture(autouse=True)
def tensors_on_the_gpu_if_there_is_one():
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture
def device():
    return DEVICE
