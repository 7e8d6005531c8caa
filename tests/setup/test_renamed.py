"""A config.yaml of an older version says what it meant, and code finds what has moved."""

import importlib

import pytest
from dynamic_dino.renamed import current, current_path


def test_values_and_paths():
    old = "_target_: dynamic_dino.text.TextEncoder\nmax_detections_per: piece\nname: one piece\n"
    new = "_target_: dynamic_dino.modeling.text.TextEncoder\nmax_detections_per: chunk\n"
    assert current(old) == new + "name: one piece\n"


@pytest.mark.parametrize("former", ["inference", "visualization", "losses.criterion"])
def test_modules_are_found_by_their_former_paths(former):
    former = f"dynamic_dino.{former}"
    present = current_path(former)
    with pytest.warns(DeprecationWarning, match=present):
        module = importlib.import_module(former)
    assert module is importlib.import_module(present)
