"""Detection in videos from Python: a source and phrases in, frames with boxes out.

from dynamic_dino import detect_video, load_detector
for frame in detect_video("clip.mp4", load_detector(), "cow. horse.", track=True):
    print(frame.time, frame.detections.phrases, frame.detections.track_ids)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from detectron2.structures import Instances

from .inference import Detector
from .prompts import PromptLike
from .tracking import Tracker
from .video import Video, open_video


@dataclass
class DetectedFrame:
    """A frame of a video and what was found in it.

    number      of the frame in its video, from 0
    time        in seconds since the first frame
    image       uint8 [H, W, 3], RGB, upright
    detections  see `Detector`; with a tracker also track_ids, see `Tracker`
    """

    number: int
    time: float
    image: np.ndarray
    detections: Instances


def detect_video(
    source: str | Path | int | Video,
    detector: Detector,
    prompt: PromptLike | None = None,
    *,
    track: bool | Tracker = False,
    every: int = 1,
    max_frames: int | None = None,
    threshold: float | None = None,
    max_detections: int | None = None,
    nms: float | None = None,
    nms_agnostic: bool | None = None,
) -> Iterator[DetectedFrame]:
    """Finds the phrases in a video, frame by frame.

    A file's frames are looked at `detector.batch_size` at a time; of what is live (a camera, most
    streams) the newest frame, one at a time, so that the detector doesn't fall behind. No more
    frames than a batch's are held, however long it takes.

    Args:
        source: a file, an address (rtsp://, http://, ...), the number of a camera, or what
            `open_video` opened.
        prompt: what to look for, the same in all frames; None: all classes of a closed-set
            detector.
        track: also follow objects from frame to frame; or the tracker that does.
        every: looks at every so many-th frame only.
        max_frames: looks at no more frames than these.
        threshold, max_detections, nms, nms_agnostic: see `Detector.__call__`. With a tracker, an
            object that is followed is kept down to half the threshold.

    Returns:
        An iterator of `DetectedFrame`s; closing it closes the source.

    Raises:
        FileNotFoundError, ValueError: for a source that can't be read or has no frames, naming it
            and what to do; for an option out of its range.
        ImportError: naming the package that is missing, and the command that installs it.
    """
    for name, value in (("every", every), ("max_frames", max_frames)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of 1 or more, not {value!r}")
    prompt = detector.all_classes() if prompt is None else prompt
    video = source if isinstance(source, Video) else open_video(source)
    threshold = detector.threshold if threshold is None else threshold
    tracker = None
    if track:
        rate = video.rate and video.rate / every
        tracker = track if isinstance(track, Tracker) else Tracker(threshold, rate)
    floor = tracker.floor if tracker else threshold
    options = (floor, max_detections, nms, nms_agnostic)
    return _detected(video, detector, prompt, tracker, every, max_frames, options)


def _detected(
    video: Video,
    detector: Detector,
    prompt: PromptLike,
    tracker: Tracker | None,
    every: int,
    max_frames: int | None,
    options: tuple,
) -> Iterator[DetectedFrame]:
    with closing(video.frames(every)) as frames:
        frames = islice(frames, max_frames)
        while batch := list(islice(frames, 1 if video.live else detector.batch_size)):
            numbers, times, images = zip(*batch, strict=True)
            for found in zip(
                numbers, times, images, detector(list(images), prompt, *options), strict=True
            ):
                frame = DetectedFrame(*found)
                if tracker is not None:
                    frame.detections = tracker.update(frame.detections, frame.time)
                yield frame
