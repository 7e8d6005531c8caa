"""``python -m dynamic_dino.evaluation``: tables of saved predictions, and its errors."""

import json
import runpy
import sys

import pytest
from dynamic_dino.evaluation import coco_ap
from dynamic_dino.evaluation.cli import main, score


@pytest.fixture
def saved(tmp_path):
    box = [10.0, 10.0, 50.0, 50.0]
    truth = {
        "images": [{"id": 1, "neg_category_ids": [], "not_exhaustive_category_ids": []}],
        "categories": [
            {"id": 2, "name": "acorn", "frequency": "r"},
            {"id": 1, "name": "mug", "frequency": "f"},
        ],
        "annotations": [{"id": c, "image_id": 1, "category_id": c, "bbox": box} for c in (1, 2)],
    }
    found = [{"image_id": 1, "category_id": 2, "bbox": box, "score": 0.5}]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "predictions.json").write_text(json.dumps(found))
    return str(tmp_path / "predictions.json"), str(tmp_path / "truth.json")


def test_the_command(saved, tmp_path, monkeypatch, capsys):
    predictions, truth = saved
    arguments = [predictions, "--dataset", truth, "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["evaluation", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("dynamic_dino.evaluation", run_name="__main__")
    assert not end.value.code
    output = capsys.readouterr().out
    assert "fixed AP" in output and "acorn (r)" in output
    results = json.loads((tmp_path / "out.json").read_text())
    assert (results["metrics"]["APr"], results["metrics"]["APf"]) == (pytest.approx(100), 0)


def test_protocols(saved, tmp_path, capsys):
    predictions, truth = saved
    for protocol, text in (("coco", "per image and class"), ("lvis", "at most 300 detections")):
        out = tmp_path / f"{protocol}.json"
        assert main(
            [predictions, "--dataset", truth, "--protocol", protocol, "--json", str(out)]
        ) == 0  # fmt: skip
        assert text in capsys.readouterr().out
    coco = json.loads((tmp_path / "coco.json").read_text())
    assert coco["metrics"] == coco_ap(truth, predictions).metrics
    assert coco["max_dets"] == 100
    main([predictions, "--dataset", truth, "--protocol", "coco", "--max-dets", "7"])
    assert "at most 7 detections" in capsys.readouterr().out


def detected(file, phrase="mug", size=(90, 90)):
    box = {"phrase": phrase, "score": 0.5, "box": [10.0, 10.0, 60.0, 60.0]}
    width, height = size
    return {"file": file, "width": width, "height": height, "prompt": [], "detections": [box]}


def test_what_predict_wrote(tmp_path):
    """Images by their file names, as much of the path as tells them apart; classes by name."""
    names = ["a/x.jpg", "b\\x.jpg", "y.jpg"]
    truth = {
        "images": [
            {"id": f"i{i}", "file_name": name, "width": 90, "height": 90}
            for i, name in enumerate(names)
        ],
        "categories": [{"id": 5, "name": "mug"}],
        "annotations": [
            {"id": i, "image_id": f"i{i}", "category_id": 5, "bbox": [10, 10, 50, 50]}
            for i in range(3)
        ],
    }
    file, found = tmp_path / "truth.json", tmp_path / "predictions.json"
    file.write_text(json.dumps(truth))

    def scored(*entries):
        found.write_text(json.dumps(entries))
        return score(found, str(file), "coco", coco_results=tmp_path / "coco.json")

    photos = [detected(f"/photos/{name}") for name in ("b/x.jpg", "a/x.jpg", "deep/y.jpg")]
    assert scored(*photos)["metrics"]["AP"] == pytest.approx(100)
    assert [row["image_id"] for row in json.loads((tmp_path / "coco.json").read_text())] == [
        "i1", "i0", "i2",
    ]  # fmt: skip
    again = score(tmp_path / "coco.json", str(file), "coco")
    assert again["metrics"]["AP"] == pytest.approx(100)
    for entry, message in (
        (detected("x.jpg"), r"entry 0: x.jpg may be a/x.jpg or b\\x.jpg"),
        (detected("z.jpg"), "entry 0: the data set has no image named z.jpg"),
        (detected("y.jpg", "cup"), r"'cup' is none of the data set's names.*\(mug"),
        (detected("y.jpg", size=(45, 90)), "y.jpg has 45 x 90 pixels, the data set's 90 x 90"),
        ({"file": "y.jpg", "detections": [{}]}, "entry 0 needs file, width"),
    ):
        with pytest.raises(ValueError, match=message):
            scored(entry)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.json", "--dataset", "TRUTH"], "nowhere.json does not exist"),
        (["PREDICTIONS", "--dataset", "nowhere.json"], "nowhere.json does not exist"),
        (["PREDICTIONS", "--dataset", "lvis_v1_vall"], "unknown data set 'lvis_v1_vall'"),
        (["TRUTH", "--dataset", "TRUTH"], "not a valid JSON list"),
        (["PREDICTIONS", "--dataset", "TRUTH", "--protocol", "refexp"], "several boxes"),
        (["PREDICTIONS", "--dataset", "TRUTH", "--max-dets", "0"], "at least 1"),
    ],
)
def test_errors(saved, capsys, arguments, message):
    names = dict(zip(("PREDICTIONS", "TRUTH"), saved, strict=True))
    with pytest.raises(SystemExit) as stop:
        main([names.get(a, a) for a in arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
