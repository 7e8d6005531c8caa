"""What `predict.py` does with a video: an annotated one, and a line of JSON for each frame."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from tqdm import tqdm

from ..data.visualization import draw_detections
from ..modeling.prompt import Prompt
from .inference import Detector, detection_records
from .tracking import Tracker
from .video import Video, VideoWriter, import_av, is_stream, open_video, shown_source
from .video_detection import detect_video


def check_video_options(args: argparse.Namespace, images: bool, videos: bool) -> None:
    """Raises ValueError for options that can't be, ImportError for a package that is missing; both
    before a model is loaded."""
    for option, value in (("--every", args.every), ("--max-frames", args.max_frames)):
        if value is not None and value < 1:
            raise ValueError(f"{option} {value} is less than 1")
    if args.camera is not None and args.camera < 0:
        raise ValueError(f"--camera {args.camera}: the first is number 0")
    if not videos:
        if args.track or args.every or args.max_frames:
            raise ValueError("--track, --every and --max-frames are of videos, and there is none")
        return
    if args.format and not images:
        raise ValueError("--format annotates images, and there are only videos")
    import_av()
    if args.track:
        Tracker(threshold=0.5)


def predict_video(
    args: argparse.Namespace,
    detector: Detector,
    source: Path | str | int,
    prompt: Prompt,
    folder: Path,
    output_path: Callable[[str, str], Path],
    failure: Callable[[object], int],
) -> int:
    """Writes `folder`/NAME.mp4 and NAME.jsonl; returns how many things were wrong.

    Args:
        output_path: (stem, ending) -> a path that nothing else has.
        failure: says what is wrong, and returns 1.

    Raises KeyboardInterrupt, unless the source is live, where that is the way to end it; OSError
    where nothing can be written. In either case what was written is whole.
    """
    problems: list[str] = []

    def say(problem: str) -> None:
        failure(problem)
        problems[:] = [problem]

    try:
        video = open_video(source, say)
    except (ValueError, OSError) as error:
        return failure(error)
    name = _stem(source)
    annotated, lines = output_path(name, ".mp4"), output_path(name, ".jsonl")
    threshold = detector.threshold if args.threshold is None else args.threshold
    every = args.every or 1
    rate = video.rate and video.rate / every
    tracker = Tracker(threshold, rate) if args.track else None
    frames = found = 0
    start = time.perf_counter()
    ending = ""
    try:
        with ExitStack() as stack:
            # Closed in the opposite order: the source first, then the files.
            file = stack.enter_context(open(lines, "w", encoding="utf-8", newline="\n"))
            writer = stack.enter_context(VideoWriter(annotated, rate))
            progress = stack.enter_context(_progress(video, every, args.max_frames))
            detected = detect_video(
                video,
                detector,
                prompt,
                track=tracker or False,
                every=every,
                max_frames=args.max_frames,
                threshold=threshold,
                max_detections=args.max_detections,
                nms=args.nms,
                nms_agnostic=args.nms_agnostic or None,
            )
            stack.callback(detected.close)
            for frame in detected:
                record = {
                    "frame": frame.number,
                    "time": round(frame.time, 4),
                    "width": frame.image.shape[1],
                    "height": frame.image.shape[0],
                    "detections": detection_records(frame.detections),
                }
                file.write(json.dumps(record) + "\n")
                file.flush()
                writer.write(draw_detections(frame.image, frame.detections), frame.time)
                frames, found = frames + 1, found + len(frame.detections)
                progress.update()
    except ValueError as error:
        failure(error if video.name in str(error) else f"{video.name}: {error}")
        problems.append(str(error))
    except KeyboardInterrupt:
        if not video.live:
            raise
        ending = ", stopped"
    finally:
        if not frames:
            lines.unlink(missing_ok=True)
        else:
            seconds = time.perf_counter() - start
            print(
                f"\n{video.name}: {frames:,} frames in {seconds:.1f} s ({frames / seconds:.1f} a "
                f"second), {found:,} detections{ending}. {annotated.name} and {lines.name}: "
                f"{folder}/"
            )
            if tracker is not None:
                print(_counted(tracker, prompt))
    return len(problems)


def _stem(source: Path | str | int) -> str:
    """What files about a source are called."""
    if isinstance(source, Path):
        return source.stem
    if not is_stream(source):
        return f"camera{source}"
    parts = urlsplit(shown_source(source))
    stem = PurePosixPath(parts.path).stem or (parts.hostname or "stream")
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in stem)


def _progress(video: Video, every: int, most: int | None) -> tqdm:
    total = -(-video.length // every) if video.length else None
    if most is not None and not (total and total < most):
        total = most
    return tqdm(total=total, unit="frame", desc=video.name[-40:], file=sys.stderr)


def _counted(tracker: Tracker, prompt: Prompt) -> str:
    """How many objects each name had, in the order in which they were asked for."""
    names = [name for name in dict.fromkeys(prompt.phrases) if tracker.counts[name]]
    counts = [f"{name} {tracker.counts[name]:,}" for name in names]
    return "distinct objects: " + (", ".join(counts) or "none")
