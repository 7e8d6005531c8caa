"""Labelling a folder: whatever ends a run, the next goes on, and in the end all is there once."""

import json
import re

import pytest
import torch
from detectron2.structures import Boxes, Instances
from dynamic_dino.data.datasets import get_metadata, load_datasets
from dynamic_dino.label import cli, label_folder
from dynamic_dino.label.journal import Journal
from dynamic_dino.label.page import least_certain, write_page
from dynamic_dino.label.run import load_ahead
from dynamic_dino.serving.inference import Detector
from helpers.browser import find_browser, open_tab
from helpers.seeds import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

NAMES = ["red panda", "鲈", "No. 2, pencil", "</script><b>"]


class LeftHalf(torch.nn.Module):
    """Finds all names but the last in the left half of an image, with scores that depend on it:
    0.2 + its width in thousandths, a tenth more for each name. Stops after `left` images."""

    left = 10**9
    looks = 0

    def forward(self, batch):
        return [{"instances": self.look(sample)} for sample in batch]

    def look(self, sample):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.looks += 1
        h, w, phrases = sample["height"], sample["width"], sample["prompt"].phrases
        found = Instances((h, w))
        n = max(len(phrases) - 1, 1)
        found.pred_boxes = Boxes(torch.tensor([[0.0, 0, w / 2, h]] * n))
        found.scores = 0.2 + w / 1000 + 0.1 * torch.arange(n)
        found.pred_classes = torch.arange(n)
        found.phrases = phrases[:n]
        return found


@pytest.fixture
def model(monkeypatch):
    model = LeftHalf()
    monkeypatch.setattr(
        cli, "make_detector", lambda args: Detector(model, 32, threshold=0.2, batch_size=2)
    )
    return model


def photos(folder):
    (folder / "day 1").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b #1%.jpg", "day 1/a.png", "day 1/鲈.png", "z.png"]):
        Image.new("RGB", (20 + 2 * i, 16)).save(folder / name)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (16, 60)).save(folder / "turned.jpg", exif=turned)
    return folder


def label(folder, *more):
    names = folder.parent / "names.txt"
    names.write_text("".join(f"{name}\n" for name in NAMES), encoding="utf-8")
    out = ("--output", str(folder.parent / "out"))
    return cli.main([str(folder), "--names", str(names), *out, *more])


def test_a_folder(tmp_path, model, capsys):
    folder, out = photos(tmp_path / "photos"), tmp_path / "out"
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:30])
    (folder / ".hidden.png").touch()
    (folder / "day 1/drawing.svg").touch()
    kinds = ("coco", "yolo", "voc", "labelme", "label-studio")
    assert label(folder, *(word for kind in kinds for word in ("--format", kind))) == 2
    printed = capsys.readouterr()
    assert "left out: 1 .svg (drawing.svg; convert it to JPEG or PNG)\n" in printed.out
    assert "6 images, 6 of them labelled now; 0 without a box" in printed.out
    assert re.search(r"  red panda +6 +6\n", printed.out)
    assert "never found: </script><b>\nimages that can't be looked at: 1\n  broken" in printed.out
    assert printed.err.count("error: ") == 1 and "broken.png can't be read" in printed.err
    results = json.loads((out / "predictions.json").read_text())
    assert [r["name"] for r in results] == [
        "a.png",
        "b #1%.jpg",
        "turned.jpg",
        "z.png",
        "day 1/a.png",
        "day 1/鲈.png",
    ]
    turned = results[2]
    assert (turned["width"], turned["height"]) == (60, 16), "as it is seen"
    assert turned["detections"][0]["box"] == [0, 0, 30, 16]
    for source in ("coco.json", "yolo:train", "voc", "labelme"):
        records = load_datasets(str(out / source))
        assert len(records) == 6 and {len(r["annotations"]) for r in records} == {3}
        names = get_metadata(str(out / source)).thing_classes
        assert {*names} == {*NAMES} if "coco" in source or "yolo" in source else {*NAMES[:3]}

    # Again: nothing is looked at twice; what is mended or new is added, what has gone is left out.
    Image.new("RGB", (40, 16)).save(folder / "broken.png")
    (folder / "z.png").unlink()
    looks = model.looks
    assert label(folder, "--page-images", "0") == 0
    assert model.looks == looks + 1
    assert "6 images, 1 of them labelled now" in capsys.readouterr().out
    Image.new("RGB", (200, 100), "red").save(folder / "a.png")  # another picture
    assert label(folder, "--page-images", "0") == 0 and model.looks == looks + 2


def test_other_settings_are_said(tmp_path, model, capsys):
    folder = photos(tmp_path / "photos")
    no_page = ("--model", "nano-x16", "--page-images", "0")
    assert label(folder, *no_page) == 0
    for more, said in (
        (("--threshold", "0.1"), "threshold was 0.2, is 0.1"),
        (("--nms", "0.7"), "nms was null, is 0.7"),
        (("--tile", "640"), "tile was null, is 640; overlap was null, is 0.2"),
        (("--model", "nano-dense"), r'model was "nano-x16", is "nano-dense"; weights was "\w{16}"'),
    ):
        assert label(folder, *no_page, *more) == 2
        assert re.search(f"labels.jsonl is of other settings: {said}", capsys.readouterr().err)
    looks = model.looks
    assert label(folder, *no_page, "--threshold", "0.35") == 0 and model.looks == looks
    scores = [
        d["score"]
        for r in json.loads((tmp_path / "out/predictions.json").read_text())
        for d in r["detections"]
    ]
    assert len(scores) == 7 and min(scores) >= 0.35, "the part of what is there"
    assert label(folder, *no_page, "--threshold", "0.1", "--restart") == 0
    assert model.looks == 2 * looks and (tmp_path / "out/labels.jsonl.1").exists()
    with Journal(tmp_path / "out", {"threshold": 0.1}, restart=True):
        with pytest.raises(ValueError, match="another process writes to"):
            Journal(tmp_path / "out", {"threshold": 0.1})
    for wrong, said in (
        ([str(folder / "none")], "does not exist"),
        ([str(folder / "a.png")], "is a file: name the folder"),
        ([str(folder), "--output", str(folder)], "choose another one for the labels"),
        ([str(tmp_path / "out"), "--output", str(tmp_path)], "contains no image"),
        ([str(folder), "--workers", "0"], "--workers 0 is less than 1"),
    ):
        assert cli.main([*wrong, "--text", "mug."]) == 2
        assert said in capsys.readouterr().err


@settings(
    max_examples=examples(6),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60)), max_size=3))
def test_ended_anywhere_it_goes_on(tmp_path_factory, ends):
    """Runs that end after some images, of which the last bytes don't reach the disk: what is there
    at the end is what one run gives, and only what was lost is looked at again."""
    root = tmp_path_factory.mktemp("ended")
    folder, out, model = photos(root / "photos"), root / "out", LeftHalf()
    detector = Detector(model, None, threshold=0.2, batch_size=1)
    lost = 0
    for images, bytes_lost in ends:
        model.left = images
        try:
            label_folder(detector, folder, NAMES, out, (), progress=False)
        except KeyboardInterrupt:
            journal = out / "labels.jsonl"
            content = journal.read_bytes()
            kept = content[: max(len(content) - bytes_lost, 0)]
            lost += max(content.count(b"\n"), 1) - max(kept.count(b"\n"), 1)
            journal.write_bytes(kept)
    model.left = 100
    labels = label_folder(detector, folder, NAMES, out, (), progress=False)
    whole = label_folder(detector, folder, NAMES, root / "whole", (), progress=False)
    assert labels.results == whole.results and len(whole.results) == 6 == whole.fresh
    assert model.looks == 6 + lost + 6
    assert len((out / "labels.jsonl").read_bytes().splitlines()) == 7


def test_images_are_read_ahead_in_order():
    """And not further than there is room for."""
    begun = []

    def load(name):
        begun.append(name)
        return name * 2

    loaded = load_ahead([*"abcdefgh"], load, workers=2, ahead=1)
    assert next(loaded) == ("a", "aa") and len(begun) <= 3
    assert [*loaded] == [(c, c * 2) for c in "bcdefgh"]


def test_the_page(tmp_path, model):
    folder, out = photos(tmp_path / "photos"), tmp_path / "out"
    detector = Detector(model, None, threshold=0.2)
    labels = label_folder(detector, folder, NAMES, out, (), progress=False)
    assert [r["name"] for r in least_certain(labels)][0::5] == ["a.png", "turned.jpg"]
    page = write_page(labels, out, "nano-x16", most=5)
    text = page.read_text(encoding="utf-8")
    assert "18 boxes in 6 images, found by nano-x16. This page has the 5 least certain." in text
    assert text.count("</script>") == 2 and "http" not in text
    content = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert content["names"] == NAMES
    assert [i["href"] for i in content["images"]][0] == "../photos/a.png"
    assert {i["thumbnail"][:23] for i in content["images"]} == {"data:image/jpeg;base64,"}
    if find_browser() is None:
        pytest.skip("no browser and playwright: BROWSER=1 make test brings both")
    with open_tab(page.as_uri(), 1200) as (tab, console):
        count = tab.locator("#count")
        assert count.text_content() == "5 of 5 images, 15 boxes"
        tab.locator("#low").fill("0.32")
        assert count.text_content() == "5 of 5 images, 10 boxes"
        tab.locator("#high").fill("0.4")
        assert tab.locator(".box").count() == 5
        tab.get_by_label(NAMES[1]).uncheck()
        assert count.text_content() == "0 of 5 images, 0 boxes"
        tab.locator("#empty").check()
        assert tab.locator("figure img").count() == 5
        tab.locator("#low").fill("0")
        tab.locator("figure .picture").first.click()
        large = tab.locator("dialog img")
        assert large.get_attribute("src") == "../photos/a.png"
        assert tab.evaluate("document.querySelector('dialog').open")
        assert not console
