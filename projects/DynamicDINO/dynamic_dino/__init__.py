"""Dynamic-DINO: a real-time open-vocabulary detector with fine-grained mixtures of experts."""

from __future__ import annotations

import sys
from typing import Any

from .renamed import FormerModules

sys.meta_path.insert(0, FormerModules())

__all__ = ["detect_video", "load_detector"]


def __getattr__(name: str) -> Any:
    # Lazily, so that `import dynamic_dino` doesn't pull torch and transformers in.
    if name == "load_detector":
        from .serving.inference import load_detector

        return load_detector
    if name == "detect_video":
        from .serving.video_detection import detect_video

        return detect_video
    if name == "__version__":  # one for both packages; the kernels stand below this one
        from dynamic_dino_kernels import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
