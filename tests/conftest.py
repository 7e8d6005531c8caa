"""Settings that every test shares. Set before torch, Detectron2 or transformers is imported.

They are environment variables where they can be, so that processes which tests start have them too.
"""

import gc
import logging
import os
import random
import tempfile

# What a developer switched on, or the batch job they sit in, must not decide what is tested.
LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
SEED, TIMES = "DYNAMIC_DINO_TEST_SEED", "DYNAMIC_DINO_TEST_TIMES"
for name in set(os.environ) - {SEED, TIMES}:
    if name in LAUNCHER or name.startswith(("DYNAMIC_DINO", "SLURM_")):
        del os.environ[name]
os.environ["OMP_NUM_THREADS"] = "1"  # small tensors: more threads only get into each other's way
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs a download is a mistake; fail at once
os.environ["MPLBACKEND"] = "agg"
_datasets = tempfile.TemporaryDirectory(prefix="dynamic-dino-tests-")
os.environ["DETECTRON2_DATASETS"] = _datasets.name

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from helpers.seeds import examples, fresh_rng, seed_everything  # noqa: E402

LOGGERS = ("detectron2", "fvcore", "dynamic_dino", "dynamic_dino_kernels")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel is defined
torch.set_num_threads(1)

# `make fuzz` sets a seed; the gate draws the same numbers every time.
try:
    import hypothesis
except ImportError:  # on a bare machine with a GPU, where the tests that need it are left out
    pass
else:
    hypothesis.settings.register_profile("gate", derandomize=True)
    hypothesis.settings.register_profile("fuzz", max_examples=examples(100), deadline=None)
    hypothesis.settings.load_profile("fuzz" if SEED in os.environ else "gate")


def pytest_collection_finish():
    """Half a million objects of the imported packages live as long as the process does: a search
    for garbage that looks at each takes a third of a second."""
    gc.freeze()


@pytest.fixture(autouse=True)
def log_as_before():
    """What a run sets up writes to the test's captured output, which is closed after it."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [([*logger.handlers], logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, propagate) in zip(loggers, before, strict=True):
        open_ones = [
            h for h in handlers if not getattr(getattr(h, "stream", None), "closed", False)
        ]
        logger.handlers[:], logger.propagate = open_ones, propagate


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """The test's own seed, which its name decides; a failing test shows how to repeat it."""
    if SEED in os.environ:
        times = os.environ.get(TIMES, "1")
        test = request.node.nodeid
        print(f"To repeat it: make fuzz SEED={os.environ[SEED]} TIMES={times} TESTS='{test}'")
    return seed_everything(request.node.nodeid)


@pytest.fixture
def rng(seed) -> np.random.Generator:
    return fresh_rng()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    """What tests share is seeded by its own name: the order of tests doesn't change it."""
    if fixturedef.scope == "function":
        return (yield)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    parameter = getattr(request, "param_index", 0)
    seed_everything(f"{fixturedef.baseid}::{fixturedef.argname}[{parameter}]")
    try:
        return (yield)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
