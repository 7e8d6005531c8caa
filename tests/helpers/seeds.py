"""Seeds of tests: fixed unless DYNAMIC_DINO_TEST_SEED asks for others, and different in each; and
how many inputs they draw. `make fuzz` sets both variables."""

import hashlib
import os
import random

import numpy as np
import torch

VARIABLE = "DYNAMIC_DINO_TEST_SEED"
TIMES = "DYNAMIC_DINO_TEST_TIMES"


def examples(count: int) -> int:
    """How many inputs a test of hypothesis draws: `count`, or so many times as many as the variable
    says. All tests ask here, see `settings(max_examples=examples(60))`."""
    return max(1, int(count * float(os.environ.get(TIMES, "1"))))


def seed_everything(name: str) -> int:
    """Seeds Python, numpy and torch for the test or fixture of this name; returns the seed."""
    text = f"{os.environ.get(VARIABLE, '0')} {name}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 2**31
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def fresh_rng() -> np.random.Generator:
    """A generator of its own for each call, which repeats with the test's seed."""
    return np.random.default_rng(np.random.randint(2**31))
