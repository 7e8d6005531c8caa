import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there, Triton's interpreter runs


@pytest.fixture(autouse=True)
def tensors_on_the_gpu_if_there_is_one():
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture
def device():
    return DEVICE
