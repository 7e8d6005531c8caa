"""predict.py with a detector that knows where to look."""

import pytest
from dynamic_dino.serving import predict
from dynamic_dino.serving.inference import Detector
from helpers.right_half import RightHalf


@pytest.fixture
def detector(monkeypatch):
    """The arguments of each detector that was made."""
    made = []

    def make(args):
        made.append(args)
        return Detector(RightHalf(), 64, batch_size=2)

    monkeypatch.setattr(predict, "make_detector", make)
    return made
