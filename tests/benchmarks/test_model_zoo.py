"""The shipped models are evaluated and timed, here on a few drawn shapes; pages say what is so."""

import json
import re
import statistics
from pathlib import Path

import model_zoo
import pytest
from dynamic_dino.data.datasets import register_builtin
from dynamic_dino.data.synthetic.drawn import write_drawn_dataset
from dynamic_dino.serving.shipped import DEFAULT_MIXTURE, DEFAULT_MODEL, SHIPPED_MODELS, THRESHOLD
from helpers.scripts import run_script
from lib import tables as results

ROOT = Path(__file__).parents[2]
COMMITTED = json.loads((ROOT / "benchmarks/results/cpu/model_zoo.json").read_text())["models"]


@pytest.fixture
def drawn(tmp_path):
    file = write_drawn_dataset(tmp_path, num_images=3, split="val")
    content = json.loads(file.read_text())
    for category in content["categories"]:
        category["novel"] = category["id"] > 1
    file.write_text(json.dumps(content))
    register_builtin(tmp_path)
    yield
    register_builtin()


@pytest.mark.slow
def test_evaluates_and_times_what_is_shipped(drawn, tmp_path):
    changes = [
        f"dataloader.{key}=drawn_val"
        for name in ("coco", "coco_present")
        for key in (
            f"test.{name}.dataset.names",
            f"test.{name}.mapper.dataset",
            f"evaluator.{name}.dataset_name",
        )
    ]
    output = tmp_path / "zoo.json"
    common = ["--device", "cpu", "--repeats", "2", "--samples", "10", "--json", output]
    common += ["--output", tmp_path / "out", "--plot", tmp_path / "zoo.png"]
    run_script(model_zoo.main, "nano-dense", *common, "--set", *changes)
    text = run_script(
        model_zoo.main,
        *("nano-x16", "--tests", "coco", "--against", "nano-dense", *common, "--set", *changes),
    )
    before = json.loads(output.read_text())
    run_script(
        model_zoo.main,
        *("nano-x16", "--tests", "coco", *common, "--repeats", "0", "--set", *changes),
    )
    report = json.loads(output.read_text())
    for key in ("times", "speed", "differences"):  # not timed, not compared: what there was stays
        assert report["models"]["nano-x16"][key] == before["models"]["nano-x16"][key]
    assert list(report["models"]) == ["nano-dense", "nano-x16"], "the first run's stays"
    dense, experts = report["models"].values()
    assert [list(model["tests"]) for model in (dense, experts)] == [
        ["coco", "coco_present"],  # sets that aren't there are left out
        ["coco"],
    ]
    assert dense["parameters"]["active"] == dense["parameters"]["total"]
    assert experts["parameters"]["active"] < experts["parameters"]["total"]
    for model in (dense, experts):
        test = model["tests"]["coco"]
        score = test["scores"]["AP50"]
        assert 0 <= score["low"] <= score["value"] <= score["high"] <= 100
        assert len(test["curve"]) == 19 and sum(c["objects"] for c in test["classes"].values()) > 0
        assert model["times"]["median_ms"] > 0 and (ROOT / model["config"]).is_file()
        assert "points" not in test
        assert {*test["chance"]} <= {*test["scores"]} and "AP50_novel" in test["chance"]
        assert sum(row["objects"] for row in test["names"].values()) > 0
    assert dense["speed"] == pytest.approx(1, abs=0.9)
    assert list(experts["differences"]["tests"]) == ["coco"]
    assert results.model_zoo(report) in text and results.model_zoo_sets(report) in text
    assert results.model_zoo_novel(report) in text
    assert (tmp_path / "zoo.png").stat().st_size > 1000


def test_a_run_is_found_by_its_folder_or_its_checkpoint(tmp_path):
    for wrong in ("nano-y16", f"mine={tmp_path}", f"mine={tmp_path / 'model_final.pth'}"):
        with pytest.raises(ValueError, match="none of nano-dense|no run with a checkpoint"):
            model_zoo.find(wrong)
    for name in ("config.yaml", "model_0000009.pth", "model_final.pth"):
        (tmp_path / name).write_text("")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    for place, weights in (
        (tmp_path, "model_final.pth"),
        (tmp_path / "model_0000009.pth", "model_0000009.pth"),
    ):
        expected = ("mine", tmp_path / "config.yaml", tmp_path / weights)
        assert model_zoo.find(f"mine={place}") == expected


def test_boxes_are_suppressed_as_they_are_when_served(tmp_path):
    rows = [(1, 1, 0.9), (1, 1, 0.8), (1, 2, 0.7), (2, 1, 0.6)]
    found = [
        {"image_id": i, "category_id": c, "bbox": [0, 0, 9 + s, 9], "score": s} for i, c, s in rows
    ]
    file = model_zoo.saved(tmp_path, "coco")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(found))
    scores = [model_zoo.predictions(tmp_path, "coco", nms).scores.tolist() for nms in (None, 0.7)]
    assert scores == [[0.9, 0.8, 0.7, 0.6], [0.9, 0.7, 0.6]]
    assert model_zoo.suppressed_from("mine", 0.5) == 0.5
    assert model_zoo.suppressed_from("nano-dense", 0.5) is None


def test_the_model_cards_name_every_shipped_model():
    cards = results.CARDS.read_text()
    for name, shipped in SHIPPED_MODELS.items():
        assert name in cards and f"configs/{shipped.config}" in cards
    assert {DEFAULT_MODEL, DEFAULT_MIXTURE} <= {*SHIPPED_MODELS}


def test_thresholds_are_those_that_were_measured():
    for name, shipped in SHIPPED_MODELS.items():
        if shipped.threshold != THRESHOLD:
            assert COMMITTED[name]["threshold"]["coco_present"]["threshold"] == shipped.threshold


def test_what_is_said_of_held_out_names_is_what_was_measured():
    """Those of accuracy.md that nano-photos' photos teach, by name; and AP50 without them."""
    text = " ".join((results.PROJECT / "docs/accuracy.md").read_text().split())
    text = text[text.index("**Held-out names.**") : text.index("The default threshold")]
    cards = " ".join(results.CARDS.read_text().split())
    tests = COMMITTED["nano-dense"]["tests"]
    near, far = (tests["val_novel"]["scores"][f"AP50_{g}"]["value"] for g in ("near", "far"))
    luck = [tests["val_novel"]["chance"][f"AP50_{g}"]["value"] for g in ("near", "far")]
    assert f"{near:.1f} AP50 for names with a near-synonym and {far:.1f} for those" in text
    assert f"with {near:.1f} AP50, the others with {far:.1f}" in cards
    for chance in luck:
        assert f"chance is {chance:.1f}" in text and f"chance is {chance:.1f}" in cards
    found = {
        test: {name: row["AP50"] for name, row in tests[test]["names"].items()}
        for test in ("val_novel", "val_real")
    }
    assert (
        f"half of them have less than {statistics.median(found['val_novel'].values()):.1f}" in text
    )
    for (taught, words), test in zip(
        re.findall(r"(three|seven) of val_\w+'s(?: names)? \((.*?)\)", text), found, strict=True
    ):
        names = words.split(", ")
        assert len(names) == {"three": 3, "seven": 7}[taught] and {*names} < {*found[test]}
        for model in ("nano-photos", "nano-dense"):
            rows = COMMITTED[model]["tests"][test]["names"]
            mean = statistics.mean(row["AP50"] for name, row in rows.items() if name not in names)
            assert f"{mean:.1f}" in text
