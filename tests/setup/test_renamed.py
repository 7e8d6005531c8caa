"""A config.yaml of an older version says what it meant."""

from dynamic_dino.renamed import current


def test_values_and_paths():
    old = "_target_: dynamic_dino.text.TextEncoder\nmax_detections_per: piece\nname: one piece\n"
    new = "_target_: dynamic_dino.modeling.text.TextEncoder\nmax_detections_per: chunk\n"
    assert current(old) == new + "name: one piece\n"
