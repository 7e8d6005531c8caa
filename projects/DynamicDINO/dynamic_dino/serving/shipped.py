"""The detectors that are shipped with the package, and which of them is meant where none is named.

Their cards are in weights/README.md. Imports nothing, so that `--help` answers at once.
"""

from __future__ import annotations

from typing import NamedTuple

THRESHOLD = 0.2  # of detectors for which none has been measured


class ShippedModel(NamedTuple):
    """config     a recipe under configs/
    weights    a file of this package's weights/
    threshold  lowest score that is shown, nms: overlap from which on only the best box of a name is
               kept (None: all are); both unless something else is asked for
    """

    config: str
    weights: str
    threshold: float = THRESHOLD
    nms: float | None = None


SHIPPED_MODELS = {
    "nano-dense": ShippedModel("pretrain/nano_stamps.py", "nano_dense.safetensors"),
    "nano-x16": ShippedModel("moe_tuning/nano_x16_stamps.py", "nano_x16.safetensors"),
    "nano-photos": ShippedModel(
        "pretrain/nano_photos.py", "nano_photos.safetensors", 0.23, nms=0.7
    ),
    "nano-photos-x16": ShippedModel(
        "moe_tuning/nano_x16_photos.py", "nano_photos_x16.safetensors", 0.23, nms=0.7
    ),
}


def defaults_of(model: str, weights: object = None) -> tuple[float, float | None]:
    """Threshold and NMS of a model: a shipped one's own, unless it has other weights."""
    shipped = SHIPPED_MODELS.get(model) if weights is None else None
    return (shipped.threshold, shipped.nms) if shipped else (THRESHOLD, None)


DEFAULT_MODEL = "nano-photos"
DEFAULT_DENSE = "nano-photos"  # what finetune.py tunes
DEFAULT_MIXTURE = "nano-x16"  # where experts are looked at

# What help, pages and docstrings ask for. The default model finds each of these names in a photo of
# Stamps' val_real, asked for all of them; a test holds that, and another one that nothing else is
# asked for.
EXAMPLE_NAMES = ("cow", "horse")
EXAMPLE_PROMPT = " ".join(f"{name}." for name in EXAMPLE_NAMES)
