"""The twins, built once; see twins.py beside this file, which the tests import from."""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from twins import FAMILIES, Twins, make_twins  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_seed():
    """Other numbers in every run; a failing test shows the seed that repeats it."""
    seed = torch.seed() % 2**31
    torch.manual_seed(seed)
    print(f"torch.manual_seed({seed})")


@pytest.fixture(scope="session")
def _twins(tmp_path_factory):
    torch.manual_seed(torch.seed() % 2**31)
    return {family: make_twins(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(params=list(FAMILIES))
def twins(request, _twins):
    both = _twins[request.param]
    return Twins(copy.deepcopy(both.theirs), copy.deepcopy(both.ours), both.folder)


@pytest.fixture
def gdino(_twins):
    both = _twins["gdino"]
    return Twins(both.theirs, copy.deepcopy(both.ours), both.folder)
