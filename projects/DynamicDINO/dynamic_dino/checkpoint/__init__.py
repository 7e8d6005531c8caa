"""Weights in and out, one way: source -> state dict -> canonical names -> model.

python -m dynamic_dino.checkpoint export --config-file CONFIG model_final.pth OUT.safetensors
python -m dynamic_dino.checkpoint export --config-file CONFIG model_final.pth DIRECTORY
python -m dynamic_dino.checkpoint import hf:IDEA-Research/grounding-dino-tiny OUT.safetensors
"""

from .files import read_state_dict
from .public import export_directory, import_public
from .weights import export_weights, load_checkpoint

__all__ = [
    "export_directory",
    "export_weights",
    "import_public",
    "load_checkpoint",
    "read_state_dict",
]
