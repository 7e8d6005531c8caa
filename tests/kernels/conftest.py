import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # ffn_arguments.py

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there, Triton's interpreter runs


@pytest.fixture(autouse=True)
def tensors_on_the_gpu_if_there_is_one():
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def fresh_seed():
    """Other numbers in every run; a failing test shows the seed that repeats it."""
    seed = torch.seed() % 2**31
    torch.manual_seed(seed)
    print(f"torch.manual_seed({seed})")


@pytest.fixture
def device():
    return DEVICE
