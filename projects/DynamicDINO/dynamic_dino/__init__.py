"""Dynamic-DINO: a real-time open-vocabulary detector with fine-grained mixtures of experts."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from .console import ending, is_looked_for, named_remedy
from .renamed import FormerModules

sys.meta_path.insert(0, FormerModules())
if is_looked_for():  # elsewhere, how a process ends is not for an import to say
    sys.excepthook = ending

__all__ = ["detect_video", "load_detector"]
LAZY = {"load_detector": ".serving.inference", "detect_video": ".serving.video_detection"}


def __getattr__(name: str) -> Any:
    # Lazily, so that `import dynamic_dino` doesn't pull torch and transformers in.
    if name in LAZY:
        with named_remedy():
            return getattr(import_module(LAZY[name], __name__), name)
    if name == "__version__":  # one for both packages; the kernels stand below this one
        from dynamic_dino_kernels import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
