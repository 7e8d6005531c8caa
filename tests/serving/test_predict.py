"""predict.py from its arguments to the files, with a detector that knows where to look."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dynamic_dino.data import images
from dynamic_dino.serving import predict
from dynamic_dino.serving.shipped import EXAMPLE_PROMPT
from helpers.right_half import RightHalf
from helpers.seeds import fresh_rng
from PIL import Image

pytestmark = pytest.mark.usefixtures("detector")
SCRIPT = Path(__file__).parents[2] / "projects" / "DynamicDINO" / "predict.py"


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    rng = fresh_rng()
    for i in range(3):
        pixels = rng.integers(0, 256, (40, 60 + 20 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"photo{i}.jpg")
    return tmp_path / "photos"


def run(tmp_path, *args):
    return predict.main([*map(str, args), "--output", str(tmp_path / "out")])


def saved(tmp_path):
    return json.loads((tmp_path / "out" / "predictions.json").read_text())


def test_one_image(tmp_path, photos, capsys):
    assert run(tmp_path, photos / "photo0.jpg", "--text", "red panda. windmill. mug. bell.") == 0
    [result] = saved(tmp_path)
    assert result["file"] == str(photos / "photo0.jpg")
    assert (result["width"], result["height"]) == (60, 40)
    assert result["prompt"] == ["red panda", "windmill", "mug", "bell"]
    assert result["detections"] == [
        {"phrase": "red panda", "score": 0.8, "box": [30, 0, 60, 40]},
        {"phrase": "windmill", "score": 0.6, "box": [30, 0, 60, 40]},
        {"phrase": "mug", "score": 0.4, "box": [30, 0, 60, 40]},
    ]
    picture = Image.open(tmp_path / "out" / "photo0.png")
    assert picture.size == (640, 427)
    printed = capsys.readouterr()
    assert re.search(r"red panda +0.80 +30 +0 +60 +40\n", printed.out)
    assert "photo0.png" in printed.out
    assert str(tmp_path / "out") in printed.out
    assert "error" not in printed.err


def test_thresholds(tmp_path, photos, capsys):
    photo = photos / "photo0.jpg"
    assert run(tmp_path, photo, "--text", "a. b. c.", "--threshold", "0.5") == 0
    assert [d["phrase"] for d in saved(tmp_path)[0]["detections"]] == ["a", "b"]
    assert run(tmp_path, photo, "--text", "a. b. c.", "--max-detections", "1") == 0
    assert [d["phrase"] for d in saved(tmp_path)[0]["detections"]] == ["a"]
    assert run(tmp_path, photo, "--text", "a. b. c.", "--threshold", "0.95") == 0
    assert saved(tmp_path)[0]["detections"] == []
    assert "nothing with a score of 0.95 or more" in capsys.readouterr().out


def test_nms_and_doubts_about_the_text(tmp_path, photos, capsys):
    photo = photos / "photo0.jpg"
    assert run(tmp_path, photo, "--text", "a, b. c.", "--nms", "0.7", "--nms-agnostic") == 0
    assert [d["phrase"] for d in saved(tmp_path)[0]["detections"]] == ["a, b"]
    assert capsys.readouterr().err.startswith("warning: 'a, b' is one phrase, since full stops")


def test_a_folder_with_one_text_for_all(tmp_path, photos, capsys):
    for name in ("._photo0.jpg", "IMG_1.SVG", "notes.txt"):
        (photos / name).touch()
    assert run(tmp_path, photos, "--text", "mug.") == 0
    assert [r["width"] for r in saved(tmp_path)] == [60, 80, 100]
    assert [r["prompt"] for r in saved(tmp_path)] == [["mug"]] * 3
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "photo0.png",
        "photo1.png",
        "photo2.png",
        "predictions.json",
        "predictions.jsonl",
    ]
    printed = capsys.readouterr()
    assert "3/3" in printed.err, "progress"
    assert "3 of 3 images" in printed.out
    assert "left out: 1 .svg (IMG_1.SVG; convert it to JPEG or PNG), 1 .txt (notes.txt)\n" in (
        printed.out
    )


def test_each_image_with_its_own_text(tmp_path, photos):
    files = [photos / f"photo{i}.jpg" for i in (2, 0, 1)]
    assert run(tmp_path, *files, "--text", "a.", "--text", "b. c.", "--text", "d.") == 0
    assert [r["prompt"] for r in saved(tmp_path)] == [["a"], ["b", "c"], ["d"]]
    assert [r["width"] for r in saved(tmp_path)] == [100, 60, 80]


def test_pictures_never_overwrite_each_other_or_an_input(tmp_path, photos):
    (photos / "sub").mkdir()
    original = Image.open(photos / "photo0.jpg")
    original.save(photos / "sub" / "photo0.png")
    original.save(photos / "photo0.png")
    before = (photos / "photo0.png").read_bytes()
    files = [photos / "photo0.jpg", photos / "sub" / "photo0.png", photos / "photo0.png"]
    assert predict.main([*map(str, files), "--text", "mug.", "--output", str(photos)]) == 0
    results = json.loads((photos / "predictions.json").read_text())
    names = [r["picture"] for r in results]
    assert names == ["photo0_2.png", "photo0_3.png", "photo0_4.png"]
    assert (photos / "photo0.png").read_bytes() == before


def test_a_damaged_image_costs_only_itself(tmp_path, photos, capsys):
    (photos / "photo1.jpg").write_bytes((photos / "photo1.jpg").read_bytes()[:400])
    assert run(tmp_path, photos, "--text", "a.", "--text", "b.", "--text", "c.") == 2
    assert [r["prompt"] for r in saved(tmp_path)] == [["a"], ["c"]]
    [line] = [s for s in capsys.readouterr().err.splitlines() if "error" in s]
    assert line.startswith("error: image ") and "photo1.jpg can't be read" in line

    assert run(tmp_path, photos / "photo1.jpg", "--text", "a.") == 2
    assert saved(tmp_path) == []
    [line] = capsys.readouterr().err.splitlines()
    assert "photo1.jpg can't be read" in line


def refuse(monkeypatch, width, cause):
    """The model raises `cause` for batches with an image of this width."""
    original = RightHalf.forward

    def forward(self, batch):
        if width in [sample["width"] for sample in batch]:
            raise cause
        return original(self, batch)

    monkeypatch.setattr(RightHalf, "forward", forward)


def test_an_interruption_keeps_what_is_done(tmp_path, photos, monkeypatch, capsys):
    refuse(monkeypatch, 100, KeyboardInterrupt())
    assert run(tmp_path, photos, "--text", "mug.") == 2
    assert [r["width"] for r in saved(tmp_path)] == [60, 80]
    printed = capsys.readouterr()
    assert "error: interrupted" in printed.err
    assert "2 of 3 images" in printed.out


def test_what_was_found_is_on_the_disk_as_it_comes(tmp_path, photos, monkeypatch, capsys):
    """Whatever ends the program: nothing that runs at its end is needed."""
    seen, kill = [], signal.SIGTERM
    original = RightHalf.forward

    def forward(self, batch):
        if seen.append(lines(tmp_path)) or len(seen) == 2:
            os.kill(os.getpid(), kill)
        return original(self, batch)

    def lines(tmp_path) -> list[dict]:
        return [*map(json.loads, (tmp_path / "out/predictions.jsonl").read_text().splitlines())]

    monkeypatch.setattr(RightHalf, "forward", forward)
    before = signal.getsignal(kill)
    assert run(tmp_path, photos, "--text", "mug.") == 2
    assert [len(part) for part in seen] == [0, 2] and signal.getsignal(kill) is before
    assert lines(tmp_path) == saved(tmp_path) == seen[1]
    assert "error: interrupted" in capsys.readouterr().err


def test_a_full_disk_keeps_what_was_found(tmp_path, photos, monkeypatch, capsys):
    def save(self, path, *arguments, **options):
        if Path(path).name == "photo2.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, path, *arguments, **options)

    original = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", save)
    assert run(tmp_path, photos, "--text", "mug.") == 2
    assert [r["width"] for r in saved(tmp_path)] == [60, 80, 100]
    [line] = [s for s in capsys.readouterr().err.splitlines() if "error" in s]
    assert "No space left on device" in line and "what was found before is there" in line


@pytest.mark.parametrize("cause", [RuntimeError("an odd size\nof it"), MemoryError()])
def test_any_error_of_an_image_is_that_image_s(tmp_path, photos, monkeypatch, capsys, cause):
    refuse(monkeypatch, 80, cause)
    real = images.load_image
    bad = lambda path: real(path) if "photo0" not in str(path) else 1 / 0  # noqa: E731
    monkeypatch.setattr(images, "load_image", bad)
    assert run(tmp_path, photos, "--text", "mug.") == 2
    assert [r["width"] for r in saved(tmp_path)] == [100]
    printed = [s for s in capsys.readouterr().err.splitlines() if "error" in s]
    assert len(printed) == 2 and "photo0.jpg: ZeroDivisionError" in printed[0]
    assert f"photo1.jpg: {type(cause).__name__}" in printed[1]


def test_a_refused_image_costs_no_other_of_its_batch(tmp_path, photos, monkeypatch, capsys):
    refuse(monkeypatch, 60, ValueError("a phrase is too long"))
    assert run(tmp_path, photos, "--text", "mug.") == 2
    assert [r["width"] for r in saved(tmp_path)] == [80, 100]
    assert re.search(r"error: .*photo0.jpg: a phrase is too long", capsys.readouterr().err)


def test_each_path_has_its_result(tmp_path, photos):
    """Links to one file and a file that is named twice too; a folder adds what isn't there yet."""
    photo = photos / "photo0.jpg"
    (photos / "link.jpg").symlink_to(photo)
    files = [photo, photos / "link.jpg", photo]
    assert run(tmp_path, *files, "--text", "a.", "--text", "b.", "--text", "c.") == 0
    assert [(r["file"], r["prompt"]) for r in saved(tmp_path)] == [
        (str(file), [name]) for file, name in zip(files, "abc", strict=True)
    ]
    assert len({r["picture"] for r in saved(tmp_path)}) == 3
    assert run(tmp_path, photo, photos, "--text", "mug.") == 0
    assert len(saved(tmp_path)) == 4


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8"])
def test_no_letter_ends_a_program(tmp_path, photos, monkeypatch, encoding):
    name = "фото 鲈 \udce9.jpg"  # the last is a byte that isn't UTF-8
    formats = ["--format", "coco", "--format", "yolo", "--format", "label-studio"]
    (photos / name).write_bytes((photos / "photo0.jpg").read_bytes())
    out = io.TextIOWrapper(io.BytesIO(), encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding, errors="strict"))
    assert run(tmp_path, photos, "--text", "鲈. рыба.", *formats) == 0
    assert [Path(r["file"]).name for r in saved(tmp_path)].count(name) == 1
    out.flush()
    text = out.buffer.getvalue().decode(encoding)
    assert ("鲈" if encoding == "utf-8" else "\\u9c88") in text and "4 of 4 images" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{photos}/none.jpg", "--text", "mug."], "none.jpg does not exist"),
        (["{photos}/*.gif", "--text", "mug."], "*.gif matches no image"),
        (["{photos}", "--text", " "], "empty prompt"),
        (["{photos}", "--text", "mug. !."], "phrase 1 of the prompt"),
        (["{photos}", "--text", "a.", "--text", "b."], "--text was given 2 times for 3 images"),
        (["{photos}", "--text", "a.", "--threshold", "30"], "--threshold 30 is not between"),
        (["{photos}", "--text", "a.", "--max-detections", "0"], "--max-detections 0 is less"),
        (["{photos}", "--text", "a.", "--nms", "nan"], "--nms nan is not between"),
        (["{photos}", "--text", "a.", "--nms-agnostic"], "--nms-agnostic needs --nms"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, photos, capsys, detector, arguments, message):
    assert run(tmp_path, *[a.format(photos=photos) for a in arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not detector, "the model was loaded before the arguments were checked"


def test_an_unwritable_folder_is_one_line(tmp_path, photos, capsys, detector):
    (tmp_path / "out").write_text("a file, where the folder should be")
    assert run(tmp_path, photos, "--text", "mug.") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: can't write to") and "--output" in line
    assert not detector


def test_model_errors_are_one_line(tmp_path, photos, capsys, monkeypatch):
    monkeypatch.undo()  # the real make_detector
    assert run(tmp_path, photos, "--text", "mug.", "--model", "nano-x61") == 2
    assert run(tmp_path, photos, "--text", "mug.", "--config-file", "nowhere.py") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "did you mean 'nano-x16'" in first
    assert second.startswith("error: nowhere.py is a recipe without weights")
    weights = ["--weights", str(tmp_path / "w.pth")]
    assert run(tmp_path, photos, "--text", "mug.", "--config-file", "nowhere.py", *weights) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "w.pth" in line and "don't exist" in line


def test_help_explains_itself_without_loading_torch():
    code = (
        "import runpy, sys; sys.argv = ['predict.py', '--help']\n"
        "try: runpy.run_path(sys.path.pop(), run_name='__main__')\n"
        "except SystemExit as e: assert e.code == 0 and 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(SCRIPT)!r})\n" + code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert f'predict.py photo.jpg --text "{EXAMPLE_PROMPT}"' in result.stdout
