"""What the page shows: a look at a picture once, and what is left of it at any threshold."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from detectron2.structures import Instances

from ..analysis.layers import moe_layers
from ..data.images import ImageLike, as_array
from ..data.visualization import draw_detections
from ..engine.evaluate import adjusted
from ..serving.inference import Detector
from ..serving.prompts import as_prompt

LOWEST = 0.01  # what the threshold can be moved down to without another look


@dataclass
class Look:
    """What a model found in a picture.

    picture     uint8 [H, W, 3], RGB
    detections  N, best first, from `LOWEST` on
    layers      names of the decoder's L MoE layers; none of a dense model
    experts     of each detection, L tuples: the experts its query took, in ascending order
    seconds     that the model took, its text and the picture's resizing included
    """

    picture: np.ndarray
    detections: Instances
    layers: list[str]
    experts: list[list[tuple[int, ...]]]
    seconds: float

    def rows(self, threshold: float) -> list[list[str | float]]:
        """Of each detection from `threshold` on: name, score, box, and the experts by layer."""
        found = self.detections
        columns = zip(
            found.phrases,
            found.scores.tolist(),
            found.pred_boxes.tensor.round().int().tolist(),
            self.experts,
            strict=True,
        )
        return [
            [phrase, round(score, 3), ", ".join(map(str, box))]
            + [", ".join(map(str, ids)) for ids in experts]
            for phrase, score, box, experts in columns
            if score >= threshold
        ]

    def headers(self) -> list[str]:
        return ["name", "score", "left, top, right, bottom", *self.layers]

    def drawn(self, threshold: float) -> np.ndarray:
        """uint8 [H', W', 3]; see `draw_detections`."""
        return draw_detections(self.picture, self.detections, threshold)

    def summary(self, threshold: float) -> str:
        shown = int((self.detections.scores >= threshold).sum())
        text = f"{shown} found in {self.seconds:.2f} s"
        if not shown and len(self.detections):
            text += f"; the best has the score {self.detections.scores[0]:.2f}: lower the threshold"
        return text


class Models:
    """Detectors by the names of the page, loaded at their first use. One looks at a time.

    Args:
        loaders: what makes each.
    """

    def __init__(self, loaders: Mapping[str, Callable[[], Detector]]) -> None:
        self.loaders = loaders
        self._loaded: dict[str, Detector] = {}
        self._lock = threading.Lock()

    def detector(self, name: str) -> Detector:
        """Raises ValueError for a name that the page doesn't offer, and what loading raises."""
        if name not in self.loaders:
            raise ValueError(f"unknown model {name!r}: choose one of {', '.join(self.loaders)}")
        if name not in self._loaded:
            self._loaded[name] = self.loaders[name]()
        return self._loaded[name]

    def look(self, name: str, picture: ImageLike | None, text: str) -> Look:
        """Looks for what `text` names, separated by full stops or line breaks.

        Raises:
            ValueError, OSError: saying what is missing or wrong, to be shown on the page.
        """
        if picture is None:
            raise ValueError("There is no picture yet: drop one on the left, or choose a file.")
        if not text.strip(" .\n\t"):
            raise ValueError('There are no names yet: type what to look for, such as "cow. horse."')
        pixels = as_array(picture)
        prompt = as_prompt(
            ". ".join(part for line in text.splitlines() if (part := line.strip(" .\t")))
        )
        with self._lock:
            detector = self.detector(name)
            layers = [n for n in _moe_layers(detector) if n.startswith("decoder")]
            start = time.perf_counter()
            if not layers:
                found = detector(pixels, prompt, LOWEST)
                experts: list[list[tuple[int, ...]]] = [[] for _ in range(len(found))]
            else:
                found, experts = look_with_experts(detector, pixels, prompt)
            seconds = time.perf_counter() - start
        return Look(pixels, found, layers, experts, seconds)


def look_with_experts(detector: Detector, pixels, prompt) -> tuple[Instances, list]:
    """Detections from `LOWEST` on, and the experts that the query of each took in every MoE layer
    of the decoder."""
    outputs: list[dict] = []
    hook = detector.model.register_forward_hook(lambda *call: outputs.extend(call[-1]))
    try:
        with adjusted(detector.model, {"return_routings": True}):
            found = detector(pixels, prompt, LOWEST)
    finally:
        hook.remove()
    [output] = outputs
    raw = output["instances"]
    # Where a detection is among those that the model returned: it is there as it is here.
    queries = dict(zip(_keys(raw), raw.queries.tolist(), strict=True))
    routings = zip(_moe_layers(detector), output["routings"], strict=True)
    ids = [r.expert_ids.cpu().numpy() for name, r in routings if name.startswith("decoder")]
    experts = [
        [tuple(sorted(int(e) for e in layer[queries[key]] if e >= 0)) for layer in ids]
        for key in _keys(found)
    ]
    return found, experts


def _keys(found: Instances) -> list[tuple]:
    boxes = found.pred_boxes.tensor.tolist()
    columns = zip(found.pred_classes.tolist(), found.scores.tolist(), boxes, strict=True)
    return [(label, score, *box) for label, score, box in columns]


def _moe_layers(detector: Detector) -> list[str]:
    """None of an exported model, which tells nothing of its inside."""
    named_modules = hasattr(detector.model, "named_modules")
    return list(moe_layers(detector.model)) if named_modules else []
