"""Convolutions of 8 bits, calibrated on photos, for OpenVINO."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.images import ImageLike
from ..modeling.prompt import Prompt
from ..serving.exported import GRAPH, SIDECAR, Exported
from ..serving.inference import load_detector


def quantize(folder: Path, photos: Sequence[ImageLike], prompt: Prompt) -> None:
    """Rewrites an exported folder for OpenVINO with convolutions of 8 bits (NNCF). Matrix products
    stay as they are: they cost accuracy, and experts in 8 bits don't compile.

    Raises ValueError where NNCF isn't installed.
    """
    try:
        import nncf
    except ImportError:
        raise ValueError(
            "--int8 needs nncf, which isn't installed: pip install 'dynamic-dino[int8]'"
        ) from None
    import openvino

    nncf.set_log_level(logging.ERROR)  # it reports each operator that it leaves alone
    feeds = _inputs(folder, photos, prompt)
    with tempfile.TemporaryDirectory() as temporary:
        quantized = nncf.quantize(
            openvino.Core().read_model(folder / GRAPH),
            nncf.Dataset(feeds),
            subset_size=len(feeds),
            preset=nncf.QuantizationPreset.MIXED,
            ignored_scope=nncf.IgnoredScope(types=["MatMul"], validate=False),
        )
        openvino.save_model(quantized, Path(temporary) / GRAPH, compress_to_fp16=False)
        del quantized  # it holds the file that is overwritten
        for file in Path(temporary).iterdir():
            (folder / file.name).unlink(missing_ok=True)  # it may be mapped into memory
            (folder / file.name).write_bytes(file.read_bytes())
    exported = load_detector(folder).model
    assert isinstance(exported, Exported)
    info = replace(exported.info, precision="int8")
    (folder / SIDECAR).write_text(info.to_json(), encoding="utf-8")


def _inputs(
    folder: Path, photos: Sequence[ImageLike], prompt: Prompt
) -> list[dict[str, np.ndarray]]:
    """What the graph is fed with for photos."""
    detector, feeds = load_detector(folder), []
    exported: Any = detector.model
    run = exported.run

    def recorded(feed: dict[str, np.ndarray]) -> Sequence[np.ndarray]:
        feeds.append(feed)
        return run(feed)

    exported.run = recorded
    for photo in photos:
        detector(photo, prompt)
    return feeds
