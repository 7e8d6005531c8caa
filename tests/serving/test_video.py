"""Videos in and out, with clips of a few small frames, and a camera that isn't there."""

import gc
import re
import struct
import threading
import warnings
import weakref

import av
import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from dynamic_dino import detect_video
from dynamic_dino.serving import video as video_module
from dynamic_dino.serving.inference import Detector
from dynamic_dino.serving.video import (
    Video,
    VideoWarning,
    VideoWriter,
    is_stream,
    newest,
    open_video,
    shown_source,
)
from helpers.seeds import examples
from hypothesis import given, settings
from hypothesis import strategies as st

TOP, BOTTOM = (200, 40, 40), (40, 40, 200)


def picture(height=48, width=64):
    """Red above blue, and black on the left: upright in one way only."""
    image = np.empty((height, width, 3), np.uint8)
    image[: height // 2], image[height // 2 :] = TOP, BOTTOM
    image[:, : width // 4] = 0
    return image


def write(path, times, size=(48, 64)):
    with VideoWriter(path, 25) as writer:
        for seconds in times:
            writer.write(picture(*size), seconds)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """60 frames that compress badly, so that there is something to damage."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    rng = np.random.default_rng(0)
    with VideoWriter(path, 25) as writer:
        for i in range(60):
            writer.write(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8), i / 25)
    return path


@settings(max_examples=examples(5), deadline=None)
@given(
    st.lists(st.floats(0.002, 3), max_size=6),
    st.tuples(st.integers(32, 65), st.integers(32, 65)),
    st.integers(1, 3),
)
def test_frames_keep_their_times_sizes_and_colours(tmp_path_factory, gaps, size, every):
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    times = np.cumsum([0, *gaps])
    write(path, times, size)
    video = open_video(path)
    assert (video.live, video.length, video.name) == (False, len(times), str(path))
    found = list(video.frames(every))
    assert [number for number, _, _ in found] == [*range(len(times))][::every]
    assert [t for _, t, _ in found] == pytest.approx([*times[::every]], abs=2e-5)
    height, width = size[0] + size[0] % 2, size[1] + size[1] % 2
    for _, _, image in found:
        assert image.shape == (height, width, 3) and image.dtype == np.uint8
        assert np.abs(image[2, -3] - np.array(TOP)).max() < 20
        assert np.abs(image[-3, -3] - np.array(BOTTOM)).max() < 20
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"


def test_a_frame_of_another_size_is_scaled_and_no_frame_is_no_file(tmp_path):
    with VideoWriter(tmp_path / "clip.mp4") as writer:
        writer.write(picture(), 0)
        writer.write(picture(96, 100), 0)  # a time that isn't later is made so
    assert [i.shape for _, _, i in open_video(tmp_path / "clip.mp4").frames()] == [(48, 64, 3)] * 2
    VideoWriter(tmp_path / "none.mp4").close()
    assert not (tmp_path / "none.mp4").exists()


@pytest.mark.parametrize(
    "matrix", [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)], ids=["90", "180", "270"]
)
def test_a_phone_that_was_turned(tmp_path, matrix):
    """Frames are upright, as OpenCV's are, whose reading is another's work."""
    data = bytearray(write(tmp_path / "clip.mp4", [0, 0.1]).read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    position = 0
    while (position := data.find(b"tkhd", position) + 1) > 0:  # of each track header
        where = data.index(upright, position)
        data[where : where + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    _, _, ours = next(open_video(tmp_path / "turned.mp4").frames())
    theirs = cv2.VideoCapture(str(tmp_path / "turned.mp4")).read()[1][..., ::-1]
    assert ours.shape == theirs.shape != picture().shape or matrix[0] == -1
    assert np.abs(ours.astype(int) - theirs).max() < 12


def test_damage_is_told_and_costs_no_other_frame(tmp_path, clip):
    data = bytearray(clip.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)
    (tmp_path / "bad.mp4").write_bytes(data)
    with pytest.warns(VideoWarning) as told:
        frames = list(open_video(tmp_path / "bad.mp4").frames())
    assert 40 < len(frames) <= 60
    assert re.search(r"bad.mp4: frame \d+, after \d.\d s, is damaged", str(told[0].message))


def test_an_end_before_the_end_is_told(tmp_path, clip):
    with av.open(str(clip)) as source, av.open(str(tmp_path / "whole.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) // 2])
    told = []
    assert len(list(open_video(tmp_path / "cut.mkv", told.append).frames())) < 40
    assert "cut.mkv ends after" in told[0] and "2.5 s: it isn't whole" in told[0]


def test_what_is_no_video_is_one_clear_error(tmp_path, clip, monkeypatch):
    (tmp_path / "text.mp4").write_text("no video" * 100)
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:20])
    with av.open(str(tmp_path / "song.m4a"), "w") as song:
        stream = song.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.rate = 16000
        song.mux([*stream.encode(sound), *stream.encode(None)])
    for source, message in (
        (tmp_path / "text.mp4", "text.mp4 can't be read: it is no video, or damaged"),
        (tmp_path / "cut.mp4", "cut.mp4 can't be read"),
        (tmp_path / "song.m4a", "song.m4a has no video in it"),
        (tmp_path, "is a folder, not a video"),
        (tmp_path / "none.mp4", "none.mp4 does not exist"),
        ("0", "video 0 does not exist; a camera is given by a number"),
        ("rtsp://user:secret@127.0.0.1:1/door", r"^rtsp://127.0.0.1:1/door can't be read: "),
        (True, "a video is a path, an address or a camera's number, not True"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            open_video(source)
        assert "secret" not in str(error.value)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'dynamic-dino\[video\]'"):
        open_video(clip)


def test_addresses():
    assert is_stream("rtsp://x/door") and is_stream("HTTPS://x/clip.mp4")
    assert not any(map(is_stream, ("https://x/photo.jpg", "clip.mp4", "s3://x/clip.mp4", 0)))
    assert shown_source("rtsp://me:secret@x:554/door?a=1") == "rtsp://x:554/door?a=1"


def test_the_newest_of_what_is_live():
    asked, closed = threading.Semaphore(0), []

    def source():
        try:
            for i in range(100):
                if i in (50, 99):
                    asked.acquire()
                yield i
            raise ValueError("the camera fell over")
        finally:
            closed.append(True)

    items = newest(source())
    first = next(items)
    while first < 49:  # until the source waits
        first = next(items)
    asked.release(2)
    with pytest.raises(ValueError, match="fell over"):
        for item in items:
            assert item > first
            first = item
    assert first == 99 and closed == [True]
    items = newest(iter_forever := (i for i in iter(int, 1)))
    assert next(items) == 0
    items.close()
    assert iter_forever.gi_frame is None, "the source is closed"


class FakeCapture:
    """A camera of three frames."""

    def __init__(self, index):
        self.left, self.released = 3 if index == 0 else 0, False

    def isOpened(self):
        return self.left > 0

    def get(self, _):
        return 0.0

    def read(self):
        self.left -= 1
        return self.left >= 0, picture()[..., ::-1]

    def release(self):
        self.released = True


def test_a_camera(monkeypatch):
    monkeypatch.setattr(cv2, "VideoCapture", FakeCapture)
    with pytest.raises(ValueError, match="camera 7 can't be opened"):
        open_video(7)
    told = []
    camera = open_video(0, told.append)
    assert camera.live and camera.rate is None
    *_, (number, _, image) = camera.frames()
    assert number == 2 and (image == picture()).all()
    assert camera.capture.released and told == ["camera 0 stopped after 3 frames"]


class Endless(Video):
    """As many frames as one likes, which knows how many there are at a time."""

    name = "endless"

    def __init__(self, count, live=False):
        self.count, self.live, self.alive, self.most = count, live, {}, 0

    def _raw(self):
        for i in range(self.count):
            yield i, i / 25, i

    def _pixels(self, frame):
        image = np.full((8, 8, 3), frame % 256, np.uint8)
        weakref.finalize(image, self.alive.pop, frame)
        self.alive[frame] = True
        self.most = max(self.most, len(self.alive))
        return image


class Everywhere(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, batch):
        self.batches.append(len(batch))
        found = [Instances((s["height"], s["width"])) for s in batch]
        for instances in found:
            instances.pred_boxes = Boxes(torch.tensor([[0.0, 0, 4, 4]]))
            instances.scores, instances.phrases = torch.tensor([0.5]), ["cow"]
            instances.pred_classes = torch.tensor([0])
        return [{"instances": instances} for instances in found]


def test_an_hour_takes_no_more_memory_than_a_second():
    model = Everywhere()
    detector, video = Detector(model, 8, batch_size=4), Endless(300)
    for frame in detect_video(video, detector, "cow.", track=True):
        assert frame.detections.track_ids.tolist() == [int(frame.number > 0)]
    gc.collect()
    assert frame.number == 299 and {*model.batches} == {4}
    assert video.most <= 2 * detector.batch_size + 1
    assert len(video.alive) <= 1, "of the loop above"


def test_which_frames_are_looked_at():
    model = Everywhere()
    detector = Detector(model, 8, batch_size=4)
    found = [f.number for f in detect_video(Endless(60), detector, "a.", every=7, max_frames=6)]
    assert found == [0, 7, 14, 21, 28, 35] and model.batches == [4, 2]
    model.batches.clear()
    for frame in detect_video(Endless(60, live=True), detector, "a.", max_frames=2):
        assert frame.image.shape == (8, 8, 3)
    assert set(model.batches) == {1}, "what is live is looked at as it comes"
    for wrong in ({"every": 0}, {"max_frames": 0}, {"every": 1.5}):
        with pytest.raises(ValueError, match=f"{[*wrong][0]} must be a whole number"):
            detect_video(Endless(1), detector, "a.", **wrong)


def test_without_h264_it_is_mpeg4(tmp_path, monkeypatch):
    monkeypatch.setattr(video_module, "ENCODERS", video_module.ENCODERS[-1:])
    write(tmp_path / "clip.mp4", [0, 0.5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [t for _, t, _ in open_video(tmp_path / "clip.mp4").frames()] == [0, 0.5]
