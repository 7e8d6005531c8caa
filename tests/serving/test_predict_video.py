"""predict.py with videos, from its arguments to the files."""

import json
import sys

import cv2
import numpy as np
import pytest
from dynamic_dino.serving import predict
from dynamic_dino.serving.video import VideoWriter, open_video
from helpers.right_half import RightHalf
from PIL import Image

pytestmark = pytest.mark.usefixtures("detector")


@pytest.fixture
def folder(tmp_path):
    """a.jpg, clip.mp4 of 5 frames, and a folder called 0."""
    (tmp_path / "in" / "0").mkdir(parents=True)
    Image.new("RGB", (60, 40)).save(tmp_path / "in" / "a.jpg")
    Image.new("RGB", (60, 40)).save(tmp_path / "in" / "0" / "b.jpg")
    with VideoWriter(tmp_path / "in" / "clip.mp4", 10) as writer:
        for i in range(5):
            writer.write(np.full((48, 64, 3), 50 * i, np.uint8), i / 10)
    return tmp_path / "in"


def run(tmp_path, *args):
    return predict.main([*map(str, args), "--output", str(tmp_path / "out")])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_video_beside_an_image(tmp_path, folder, capsys):
    """The folder's image and video, each with its own text."""
    assert run(tmp_path, folder, "--text", "mug.", "--text", "cow. horse.", "--track") == 0
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "a.png",
        "predictions.json",
        "predictions.jsonl",
        "clip.mp4",
        "clip.jsonl",
    }
    [image] = json.loads((out / "predictions.json").read_text())
    assert image["prompt"] == ["mug"]
    frames = lines(out / "clip.jsonl")
    assert [(f["frame"], f["time"]) for f in frames] == [(i, i / 10) for i in range(5)]
    box = {"score": 0.8, "box": [32, 0, 64, 48]}
    assert frames[4] == {
        "frame": 4,
        "time": 0.4,
        "width": 64,
        "height": 48,
        "detections": [
            {"phrase": "cow", "track": 1} | box,
            {"phrase": "horse", "track": 2} | box | {"score": 0.6},
        ],
    }
    annotated = list(open_video(out / "clip.mp4").frames())
    assert [round(t, 3) for _, t, _ in annotated] == [0, 0.1, 0.2, 0.3, 0.4]
    assert annotated[0][2].shape == (480, 640, 3)
    printed = capsys.readouterr()
    assert "5/5" in printed.err and "frame/s" in printed.err
    assert "5 frames in" in printed.out and "10 detections. clip.mp4 and clip.jsonl" in printed.out
    assert "distinct objects: cow 1, horse 1\n" in printed.out


def test_some_frames_beside_the_original(tmp_path, folder):
    """Patterns name videos too; a video's own file is never written to."""
    before = (folder / "clip.mp4").read_bytes()
    args = [str(folder / "*.mp4"), "--text", "mug.", "--every", "2", "--max-frames", "2"]
    assert predict.main([*args, "--output", str(folder)]) == 0
    assert [f["frame"] for f in lines(folder / "clip.jsonl")] == [0, 2]
    assert "track" not in lines(folder / "clip.jsonl")[0]["detections"][0]
    assert (folder / "clip.mp4").read_bytes() == before
    assert len(list(open_video(folder / "clip_2.mp4").frames())) == 2
    assert not (folder / "predictions.json").exists(), "there was no image"


@pytest.mark.parametrize("live", [False, True])
def test_an_interruption_leaves_whole_files(tmp_path, folder, monkeypatch, capsys, live):
    """Of a live source it is the way to end it."""
    original = RightHalf.forward
    calls = []

    def forward(self, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, batch)

    class Camera:
        def __init__(self, index):
            assert index == 0

        def isOpened(self):
            return True

        def get(self, _):
            return 30.0

        def read(self):
            return True, np.zeros((48, 64, 3), np.uint8)

        def release(self):
            calls.append("released")

    monkeypatch.setattr(RightHalf, "forward", forward)
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    source = ["--camera", "0"] if live else [folder / "clip.mp4"]
    assert run(tmp_path, *source, "--text", "mug.") == (0 if live else 2)
    name, count = ("camera0", 1) if live else ("clip", 2)
    assert len(lines(tmp_path / "out" / f"{name}.jsonl")) == count
    assert len(list(open_video(tmp_path / "out" / f"{name}.mp4").frames())) == count
    printed = capsys.readouterr()
    assert ("error: interrupted" in printed.err) != live
    assert ("stopped" in printed.out) == live == ("released" in calls)


def test_what_is_wrong_with_a_video_costs_no_other(tmp_path, folder, capsys):
    (folder / "bad.mp4").write_text("no video")
    assert run(tmp_path, folder / "bad.mp4", folder / "clip.mp4", "--text", "mug.") == 2
    [error] = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error")]
    assert error.endswith("bad.mp4 can't be read: it is no video, or damaged")
    assert len(lines(tmp_path / "out" / "clip.jsonl")) == 5
    assert not (tmp_path / "out" / "bad.jsonl").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{f}/clip.mp4", "--every", "0"], "--every 0 is less than 1"),
        (["{f}/clip.mp4", "--max-frames", "-1"], "--max-frames -1 is less than 1"),
        (["{f}/clip.mp4", "--format", "coco"], "--format annotates images"),
        (["{f}/a.jpg", "--track"], "--track, --every and --max-frames are of videos"),
        (["--camera", "-1"], "--camera -1: the first is number 0"),
        (["{f}/clip.mp4", "--text", "a.", "--text", "b."], "2 times for 1 images and videos"),
        (["0"], "0 does not exist"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, folder, capsys, detector, arguments, message):
    arguments = [a.format(f=folder) for a in arguments]
    text = [] if "--text" in arguments else ["--text", "mug."]
    assert run(tmp_path, *arguments, *text) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not detector, "the model was loaded before the arguments were checked"


def test_a_folder_called_0_is_a_folder(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert run(tmp_path, "0", "--text", "mug.") == 0
    [image] = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert image["file"] == "0/b.jpg"


def test_what_is_missing_is_said_before_a_model_is_loaded(
    tmp_path, folder, monkeypatch, capsys, detector
):
    for package, option in (("trackers", ["--track"]), ("av", [])):
        monkeypatch.setitem(sys.modules, package, None)
        assert run(tmp_path, folder / "clip.mp4", "--text", "mug.", *option) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and package in line.lower() and "pip install" in line
    with pytest.raises(SystemExit):
        run(tmp_path, "--text", "mug.")
    assert "nothing to look at" in capsys.readouterr().err
    assert not detector
