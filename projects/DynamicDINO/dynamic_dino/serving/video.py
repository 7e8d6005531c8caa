"""Video in and out: files, streams and cameras as frames, frames as a file.

Files and streams are read, and files written, by PyAV, which brings FFmpeg's libraries. OpenCV,
which is installed anyway, was weighed: its `VideoCapture` can't tell a damaged frame from the end,
and the FFmpeg in its wheels has no encoder for H.264, so that browsers don't play what its
`VideoWriter` makes, whose frames can't have times of their own either. PyAV tells and writes each
frame's time (what phones film has no constant rate), says how a phone was held and what is wrong
with a packet, and writes H.264. A camera is read by OpenCV, which takes it by its number on every
system.
"""

from __future__ import annotations

import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import numpy as np

from ..data.image_files import is_picture

T = TypeVar("T")
Say = Callable[[str], object]

SUFFIXES = (
    ".3gp .asf .avi .flv .m2ts .m4v .mjpeg .mjpg .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob "
    ".webm .wmv .y4m"
).split()
STREAM = re.compile(r"(rtsps?|rtmps?|rtp|udp|tcp|srt|https?)://", re.IGNORECASE)
# A stream that is silent for so many seconds is given up: to connect, and between frames.
TIMEOUT = (10.0, 20.0)
# Where nothing says how many frames a second has, as of most cameras.
RATE = 25.0
# Of the times in written files: whole for the usual rates, and as fine as MPEG-4 takes it.
CLOCK = Fraction(1, 60_000)
# Encoders, the best first. The last is what every build of FFmpeg has.
ENCODERS: tuple[tuple[str, dict[str, str]], ...] = (
    ("libx264", {"preset": "veryfast", "crf": "23"}),
    ("libopenh264", {}),
    ("mpeg4", {"qscale": "4"}),
)


class VideoWarning(UserWarning):
    """A video that isn't whole."""


def is_video(path: Path) -> bool:
    """By its name. Hidden files are none."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def is_stream(name: object) -> bool:
    """Whether it is an address that is opened as a video: rtsp, rtmp, http, udp, srt, ..."""
    if not isinstance(name, str) or not STREAM.match(name):
        return False
    return not is_picture(Path(urlsplit(name).path))


def shown_source(source: str | Path | int) -> str:
    """A source as it is shown: a camera by its number, an address without user and password."""
    if isinstance(source, int):
        return f"camera {source}"
    if not is_stream(source):
        return str(source)
    parts = urlsplit(str(source))
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def open_video(source: str | Path | int, say: Say | None = None) -> Video:
    """Opens a file, an address (see `is_stream`) or, by its number, a camera.

    Args:
        say: is told of damaged frames and of an end before the end; default: a `VideoWarning`.

    Raises:
        FileNotFoundError, ValueError: naming the source, what is wrong with it, and what to do.
        ImportError: naming the package that is missing.
    """
    if say is None:
        say = _warn
    if isinstance(source, int) and not isinstance(source, bool):
        return Camera(source, say)
    if not isinstance(source, str | Path):
        raise ValueError(f"a video is a path, an address or a camera's number, not {source!r}")
    if not is_stream(source):
        if Path(source).is_dir():
            raise ValueError(f"{source} is a folder, not a video")
        if not Path(source).is_file():
            number = str(source).isdecimal()
            hint = "; a camera is given by a number, not a text" if number else ""
            raise FileNotFoundError(f"video {source} does not exist{hint}")
    return Clip(source, say)


class Video:
    """Frames from somewhere, once through; `open_video` makes one.

    name    as it is shown
    live    frames come in their own time: whoever is slower gets the newest, not all
    rate    frames per second, nominal; None where nobody knows
    length  how many frames there should be; None where nobody knows
    damaged how many places couldn't be decoded so far
    """

    name: str
    live: bool
    rate: float | None = None
    length: int | None = None
    damaged = 0

    def frames(self, every: int = 1) -> Iterator[tuple[int, float, np.ndarray]]:
        """(number of the frame, from 0; seconds since the first; uint8 [H, W, 3], RGB) of every
        so many-th frame. The times increase. The source is closed at the end, or when the
        iterator is."""
        raw = self._raw()
        number, due, before = -1, 0, -1.0
        frames = newest(raw) if self.live else raw
        try:
            for number, seconds, frame in frames:
                if number < due:
                    continue
                due = number + every
                before = seconds if seconds > before else before + 1e-3
                yield number, before, self._pixels(frame)
        finally:
            frames.close()

    def close(self) -> None:
        """Of a source whose frames nobody asked for."""
        raise NotImplementedError

    def _raw(self) -> Iterator[tuple[int, float, Any]]:
        raise NotImplementedError

    def _pixels(self, frame: Any) -> np.ndarray:
        raise NotImplementedError


class Clip(Video):
    """A file or a stream, by PyAV. A stream that says how long it is, such as a file on a web
    server, is no live one."""

    def __init__(self, source: str | Path, say: Say) -> None:
        av = import_av()
        self.name, self.say = shown_source(source), say
        stream = is_stream(source)
        try:
            self.container = av.open(
                str(source),
                timeout=TIMEOUT if stream else None,
                options={"rtsp_transport": "tcp"} if str(source).lower().startswith("rtsp") else {},
                metadata_errors="replace",
            )
        except (av.FFmpegError, OSError) as error:
            kind = "" if stream else "video "
            raise ValueError(f"{kind}{self.name} can't be read: {_reason(error)}") from None
        covers = av.stream.Disposition.attached_pic  # of a song, which is no video
        streams = [s for s in self.container.streams.video if not s.disposition & covers]
        if not streams:
            self.close()
            raise ValueError(f"{self.name} has no video in it")
        self.stream = streams[0]
        self.stream.thread_type = "AUTO"
        rate = self.stream.average_rate or self.stream.guessed_rate
        self.rate = float(rate) if rate else None
        self.seconds = self._duration()
        self.live = stream and self.seconds is None
        if self.stream.frames:
            self.length = self.stream.frames
        elif self.seconds and self.rate:
            self.length = max(round(self.seconds * self.rate), 1)

    def close(self) -> None:
        self.container.close()

    def _duration(self) -> float | None:
        """In seconds, as the file says."""
        if self.stream.duration and self.stream.time_base:
            return float(self.stream.duration * self.stream.time_base)
        if self.container.duration:
            return self.container.duration / 1e6
        return None

    def _raw(self) -> Iterator[tuple[int, float, Any]]:
        av = import_av()
        first, number, seconds = None, 0, 0.0
        end = None
        with self.container:
            packets = self.container.demux(self.stream)
            while True:
                try:
                    packet = next(packets, None)
                except (av.FFmpegError, OSError) as error:
                    end = _reason(error)
                    break
                if packet is None:
                    break
                try:
                    decoded = packet.decode()
                except av.error.EOFError:
                    break
                except (av.FFmpegError, OSError) as error:
                    self._damage(number, seconds, _reason(error))
                    continue
                for frame in decoded:
                    if frame.is_corrupt:
                        self._damage(number, seconds, "it is incomplete")
                    if frame.time is not None:
                        first = frame.time if first is None else first
                        seconds = frame.time - first
                    elif number:
                        seconds += 1 / (self.rate or RATE)
                    yield number, seconds, frame
                    number += 1
        self._tell_end(number, seconds, end)

    def _damage(self, number: int, seconds: float, reason: str) -> None:
        self.damaged += 1
        if self.damaged == 1:
            self.say(f"{self.name}: frame {number}, after {seconds:.1f} s, is damaged: {reason}")

    def _tell_end(self, number: int, seconds: float, reason: str | None) -> None:
        if self.damaged > 1:
            self.say(f"{self.name}: {self.damaged:,} frames are damaged")
        if not number:
            raise ValueError(f"{self.name} has no frames" + (f": {reason}" if reason else ""))
        if reason:
            self.say(f"{self.name} broke off after {number:,} frames, {seconds:.1f} s: {reason}")
        elif self.seconds is not None and self.seconds - seconds > max(1.0, 2 / (self.rate or 2)):
            self.say(
                f"{self.name} ends after {seconds:.1f} s, though it says that it has "
                f"{self.seconds:.1f} s: it isn't whole"
            )

    def _pixels(self, frame: Any) -> np.ndarray:
        # How the camera was held, in degrees anticlockwise, of which FFmpeg turns nothing itself.
        turns = round(frame.rotation / 90) % 4
        return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))


class Camera(Video):
    """A camera of this machine, by OpenCV."""

    live = True

    def __init__(self, index: int, say: Say) -> None:
        import cv2

        self.name, self.say = shown_source(index), say
        self.capture = cv2.VideoCapture(index)
        if not self.capture.isOpened():
            raise ValueError(
                f"{self.name} can't be opened: is it connected, used by another program, or "
                "forbidden to this one? The first is number 0"
            )
        rate = self.capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate < 1000 else None

    def close(self) -> None:
        self.capture.release()

    def _raw(self) -> Iterator[tuple[int, float, Any]]:
        start, number = None, 0
        try:
            while True:
                there, frame = self.capture.read()
                now = time.monotonic()
                if not there:
                    break
                start = now if start is None else start
                yield number, now - start, frame
                number += 1
        finally:
            self.close()
        if not number:
            raise ValueError(f"{self.name} gives no pictures")
        self.say(f"{self.name} stopped after {number:,} frames")

    def _pixels(self, frame: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(frame[..., ::-1])  # OpenCV's are BGR


class newest(Generic[T]):
    """Runs an iterator in a thread and gives its newest item, once: what came while nobody asked is
    dropped, so that neither memory nor delay grows."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._changed = threading.Condition()
        self._item: list[T] = []
        self._error: BaseException | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        error = None
        try:
            for item in self._items:
                with self._changed:
                    if self._ended:
                        break
                    self._item[:] = [item]
                    self._changed.notify()
        except BaseException as e:
            error = e
        finally:
            self._items.close()  # type: ignore[attr-defined]
            with self._changed:
                self._ended, self._error = True, error
                self._changed.notify()

    def __iter__(self) -> newest[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            # With a timeout, since on Windows Ctrl-C doesn't end a wait without one.
            while not self._item and not self._ended:
                self._changed.wait(0.5)
            if self._item:
                return self._item.pop()
            error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        """Ends the thread, which closes the source; it is not waited for longer than a camera
        takes, since a silent stream answers in its own time."""
        with self._changed:
            self._ended = True
            self._item.clear()
        self._thread.join(2.0)


class VideoWriter:
    """An MP4 file, frame by frame: H.264 where FFmpeg has an encoder of it, else MPEG-4 part 2.

    Frames keep the times that they are given. If the program is killed, what it wrote can be
    played up to some seconds before: the file consists of fragments until it is closed.

    Args:
        rate: frames per second, nominal; the encoder's budget depends on it, times don't.
    """

    def __init__(self, path: Path, rate: float | None = None) -> None:
        av = import_av()
        self.path = path
        self.rate = Fraction(min(max(rate or RATE, 0.1), 240)).limit_denominator(1001)
        self.size: tuple[int, int] | None = None
        self._last = -1
        self._options = _first_encoder()
        options = {"movflags": "+hybrid_fragmented", "flush_packets": "1"}
        self._container = av.open(str(path), "w", format="mp4", options=options)

    def write(self, image: np.ndarray, seconds: float) -> None:
        """image: uint8 [H, W, 3], RGB; one of another size than the first is scaled to it.
        seconds: when it is shown; must be later than the one before. Raises OSError."""
        av = import_av()
        if self.size is None:
            self._begin(image)
        if image.shape[:2] != self.size:
            import cv2

            height, width = self.size
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        height, width = self.size
        if height % 2 or width % 2:  # the colours of two by two pixels are one
            image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        self._last = max(round(seconds / CLOCK), self._last + 1)
        frame.pts, frame.time_base = self._last, CLOCK
        self._mux(frame)

    def close(self) -> None:
        """Raises OSError."""
        try:
            if self.size is not None:
                self._mux(None)
        finally:
            self._container.close()
            if self.size is None:  # a file without a frame is none
                self.path.unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, image: np.ndarray) -> None:
        height, width = image.shape[:2]
        name, options = self._options
        stream = self._container.add_stream(name, rate=self.rate, options=options)
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = CLOCK
        stream.codec_context.gop_size = 60  # so that a player finds any second quickly
        self._stream, self.size = stream, (height, width)

    def _mux(self, frame: Any) -> None:
        av = import_av()
        try:
            self._container.mux(self._stream.encode(frame))
        except av.FFmpegError as error:
            raise OSError(f"can't write {self.path}: {_reason(error)}") from None


def import_av() -> ModuleType:
    """PyAV. Raises ImportError with the command that installs it."""
    try:
        import av
    except ImportError:
        raise ImportError(
            "videos need PyAV, which isn't installed: pip install 'dynamic-dino[video]' "
            "(in a checkout: pip install -e '.[video]')"
        ) from None
    return av


def _first_encoder() -> tuple[str, dict[str, str]]:
    av = import_av()
    for name, options in ENCODERS:
        if name in av.codec.codecs_available:
            return name, options
    raise ValueError("this FFmpeg has no encoder for videos: pip install --force-reinstall av")


def _reason(error: Exception) -> str:
    """What FFmpeg says, without the address, which may have a password in it."""
    text = getattr(error, "strerror", None) or str(error)
    if type(error).__name__ == "InvalidDataError":
        return "it is no video, or damaged" if "avcodec" not in str(error) else text
    return text


def _warn(message: str) -> None:
    warnings.warn(message, VideoWarning, stacklevel=3)
