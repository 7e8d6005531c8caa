"""Labelling a folder of images: what a text names is written as annotations, to be looked over.

`run.label_folder` does it, `journal` holds what is done, `page` shows it; on the command line,
``python -m dynamic_dino.label``.
"""

from .run import Labels, label_folder

__all__ = ["Labels", "label_folder"]
