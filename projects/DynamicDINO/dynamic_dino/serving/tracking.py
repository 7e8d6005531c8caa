"""Objects of a video followed from frame to frame, by the library `trackers`' ByteTrack.

It was chosen for what it pulls in: Roboflow's `trackers` has no compiled part and is kept up;
`motpy` and `norfair` bring filterpy, the latter with old versions of others, and `supervision` has
no tracker any more. `trackers` asks for opencv-python, which mustn't lie beside the
opencv-python-headless that is here, so that it is installed by ``pip install --no-deps trackers``;
everything else that it needs comes with the extra ``track``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances

REMEDY = "pip install 'dynamic-dino[track]' && pip install --no-deps trackers"


class Tracker:
    """Gives detections `track_ids`: the same object the same number, in all frames of a video.

    Each name has a tracker of its own, so that no object changes its name. An object is counted
    when it is seen in two frames in turn; its number stays its own when it is out of sight for at
    most `patience`, and is never given again.

    Detections at or above `threshold` begin tracks; weaker ones go on with them, which is the idea
    of ByteTrack (ECCV 2022, section 3): see `floor`.

    Args:
        threshold: lowest score of an object that is new.
        rate: of the frames that `update` is given, per second; None: unknown.
        patience: in seconds; at least that of five frames.

    Attributes:
        counts: how many objects each name had so far.
        floor: the lowest score that is worth giving to `update`, half the threshold.

    Raises ImportError, naming what to install.
    """

    def __init__(self, threshold: float, rate: float | None = None, patience: float = 2.0) -> None:
        self._make = _byte_track(threshold, rate or 30.0, max(patience, 5 / (rate or 30.0)))
        self.threshold = threshold
        self.floor = threshold / 2
        self.counts: Counter[str] = Counter()
        self._trackers: dict[str, Any] = {}
        self._numbers: dict[str, dict[int, int]] = {}  # name -> the library's number -> ours

    def update(self, detections: Instances, seconds: float) -> Instances:
        """The detections of the next frame, with `track_ids`.

        Args:
            detections: scores, phrases, pred_boxes; all with a score of `floor` or more.
            seconds: the frame's time, later than that of the one before.

        Returns:
            Those of at least `threshold`, and weaker ones that go on with a track, in their order,
            with track_ids: int64 [N], from 1; 0 for what is no track, or none yet.
        """
        ids = np.zeros(len(detections), dtype=np.int64)
        names = np.array([str(phrase) for phrase in detections.phrases], dtype=object)
        for name in dict.fromkeys([*self._trackers, *names]):
            rows = np.flatnonzero(names == name)
            ids[rows] = self._follow(name, rows, detections, seconds)
        found = detections[(detections.scores >= self.threshold) | (torch.from_numpy(ids) > 0)]
        found.track_ids = torch.from_numpy(
            ids[(detections.scores >= self.threshold).numpy() | (ids > 0)]
        )
        return found

    def _follow(
        self, name: str, rows: np.ndarray, detections: Instances, seconds: float
    ) -> np.ndarray:
        """The numbers of the detections in these rows, all of one name."""
        import supervision as sv

        if name not in self._trackers:
            self._trackers[name], self._numbers[name] = self._make(), {}
        tracker, numbers = self._trackers[name], self._numbers[name]
        tracked = tracker.update(
            sv.Detections(
                xyxy=detections.pred_boxes.tensor.numpy()[rows].astype(np.float64).reshape(-1, 4),
                confidence=detections.scores.numpy()[rows],
                class_id=np.arange(len(rows)),  # which of them it is: their order changes
            ),
            timestamp=seconds,
        )
        ids = np.zeros(len(rows), dtype=np.int64)
        for row, theirs in zip(tracked.class_id, tracked.tracker_id, strict=True):
            if theirs >= 0:
                if theirs not in numbers:
                    self.counts[name] += 1
                    numbers[theirs] = self.counts.total()
                ids[row] = numbers[theirs]
        # Nothing is kept of what is lost for good: an hour takes no more memory than a minute.
        alive = {track.tracker_id for track in tracker.tracks}
        self._numbers[name] = {k: v for k, v in numbers.items() if k in alive}
        if not tracker.tracks:
            del self._trackers[name], self._numbers[name]
        return ids


def _byte_track(threshold: float, rate: float, patience: float) -> Callable[[], Any]:
    try:
        import supervision  # noqa: F401
        from trackers import ByteTrackTracker
    except ImportError as error:
        raise ImportError(f"tracking needs {error.name}, which isn't installed: {REMEDY}") from None
    return lambda: ByteTrackTracker(
        lost_track_buffer=round(30 * patience),  # in frames of which 30 are a second
        frame_rate=rate,
        track_activation_threshold=threshold,
        high_conf_det_threshold=threshold,
    )
