"""Every benchmark's config evaluates miniatures of its data sets, in the published formats; a
detector that is told the answers finds everything."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from detectron2.structures import Boxes, Instances
from dynamic_dino.config import ConfigError, load_config
from dynamic_dino.data import datasets
from dynamic_dino.data.odinw import MINIVAL, ODINW13, PROMPTS, files_of
from dynamic_dino.engine.evaluate import do_test, means
from dynamic_dino.evaluation.cli import main as score
from helpers import miniatures

EVAL = Path(__file__).parents[2] / "configs/eval"
NANO = EVAL.parent / "moe_tuning/nano_x16_drawn.py"


class Oracle(torch.nn.Module):
    """Finds the boxes of the annotations. Notes what it was asked, and with which settings."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.max_phrases, self.max_detections, self.max_detections_per = None, 7, "image"
        self.asked, self.settings = [], set()

    def forward(self, batch):
        self.settings.add((self.max_phrases, self.max_detections, self.max_detections_per))
        results = []
        for sample in batch:
            self.asked.append(sample["prompt"].text)
            truth = sample["instances"]
            boxes = truth.gt_boxes.clone()
            height, width = sample["image_size"]
            boxes.scale(sample["width"] / width, sample["height"] / height)
            found = Instances((sample["height"], sample["width"]))
            found.pred_boxes, found.pred_classes = Boxes(boxes.tensor), truth.gt_classes
            found.scores = torch.linspace(0.9, 0.8, len(truth))
            results.append({"instances": found})
        return results


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "datasets"
    folder.mkdir()
    datasets.register_builtin(folder)
    yield folder
    datasets.register_builtin()


@pytest.fixture
def evaluate(tmp_path):
    """evaluate("coco", "key=value", ...) -> scores, and the detector."""

    def run(name, *overrides, oracle=None):
        oracle = oracle or Oracle()
        output = f"train.output_dir={tmp_path / 'output' / name}"
        options = [output, "evaluation.num_workers=0", "evaluation.batch_size=3", *overrides]
        return do_test(load_config(EVAL / f"{name}.py", options), oracle), oracle

    return run


def predictions(tmp_path, config, name):
    return str(tmp_path / "output" / config / "evaluation" / name / "predictions.json")


def test_coco(root, evaluate, rng, tmp_path, capsys):
    miniatures.write_coco(root, rng, "val")
    scores, oracle = evaluate("coco")
    assert scores["coco/AP"] == pytest.approx(100) and "coco/AR100" in scores
    assert len(oracle.asked) == 4 and len(set(oracle.asked)) == 1
    saved = predictions(tmp_path, "coco", "coco")
    assert score([saved, "--dataset", "coco_2017_val"]) == 0
    assert "at most 100 detections per image and class" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["lvis_minival", "lvis_val"])
def test_lvis(root, evaluate, rng, tmp_path, name, capsys):
    if name == "lvis_val":
        miniatures.write_lvis(root, rng)
    else:
        miniatures.write_lvis(root, rng, "lvis/lvis_v1_minival.json")
    scores, oracle = evaluate(name)
    assert scores[f"{name}/AP"] == pytest.approx(100)
    assert {f"{name}/AP{letter}" for letter in "rcf"} <= scores.keys()
    assert oracle.settings == {(40, 300, "chunk")}
    assert (oracle.max_phrases, oracle.max_detections) == (None, 7)
    assert all("_" not in text and "(" not in text for text in oracle.asked), "names are cleaned"
    results = tmp_path / "output" / name / "evaluation" / name / "results.json"
    assert json.loads(results.read_text())["protocol"] == "lvis-fixed"

    saved = predictions(tmp_path, name, name)
    arguments = [saved, "--dataset", "lvis_v1_" + name.removeprefix("lvis_")]
    for protocol, text in ((None, "10,000 detections per class"), ("lvis", "300 .* per image")):
        assert score(arguments + (["--protocol", protocol] if protocol else [])) == 0
        printed = capsys.readouterr().out
        assert "100.0" in printed and "rare" in printed
        assert re.search(text, printed)


def test_refcoco(root, evaluate, rng, tmp_path, capsys, caplog):
    miniatures.write_refcoco(root, rng, "refcoco", "testA", count=4)
    miniatures.write_refcoco(root, rng, "refcocog", "val")
    scores, oracle = evaluate("refcoco")
    metrics = [f"{name}/P@{k}" for name in ("refcoco_testA", "refcocog_val") for k in (1, 5, 10)]
    assert {key: scores[key] for key in metrics} == dict.fromkeys(metrics, 100)
    assert set(scores) == set(metrics)
    assert "6 of 8 test sets are missing" in caplog.text
    assert all(" that is " in text for text in oracle.asked), "the whole sentence is asked for"
    saved = predictions(tmp_path, "refcoco", "refcoco_testA")
    assert score([saved, "--dataset", "refcoco_testA"]) == 0
    printed = capsys.readouterr().out
    assert "P@10" in printed and "expressions" in printed


def write_odinw(root, rng, name):
    split = "minival" if name in MINIVAL else "val"
    file, images = files_of(name, split)[0]
    names = tuple(f"thing {i}" for i in range(1, 14))
    written = miniatures.write_odinw(root, rng, images, names, count=2)
    written.rename(root / file)


@pytest.mark.slow
def test_odinw13_complete(root, evaluate, rng, caplog):
    for name in ODINW13:
        write_odinw(root, rng, name)
    scores, oracle = evaluate("odinw13")
    sets = {key.split("/")[0] for key in scores} - {"ODinW13", "ODinW13, prompts"}
    assert sets == {*ODINW13, *(f"{name}_prompts" for name in ODINW13 if name in PROMPTS)}
    assert scores["ODinW13/AP"] == scores["ODinW13, prompts/AP"] == pytest.approx(100)
    assert any("flat mushroom" in text for text in oracle.asked)
    assert "missing" not in caplog.text


def test_odinw35_of_which_two_are_there(root, evaluate, rng, caplog):
    write_odinw(root, rng, "CottontailRabbits")
    write_odinw(root, rng, "Raccoon")
    caplog.set_level(logging.INFO)
    scores, _ = evaluate("odinw35")
    assert "ODinW35/AP" not in scores, "no mean of 35 sets is claimed"
    assert scores["ODinW35 (2 of 35 sets)/AP"] == pytest.approx(100)
    assert scores["ODinW35, prompts (2 of 35 sets)/AP"] == pytest.approx(100)
    assert "Aquarium: " in caplog.text and "Raccoon: " not in caplog.text


def test_no_set_at_all_is_an_error(root, evaluate):
    with pytest.raises(ConfigError, match="(?s)42 of 42 test sets are missing.*DETECTRON2_DATA"):
        evaluate("odinw35")
    with pytest.raises(ConfigError, match="instances_val2017.json does not exist"):
        evaluate("coco")


def test_a_data_set_of_ones_own(evaluate, rng, tmp_path):
    path = miniatures.write_odinw(tmp_path, rng, "mine", ("mug", "acorn"))
    scores, oracle = evaluate("dataset", f"evaluation.dataset={path}")
    assert scores["dataset/AP"] == pytest.approx(100)
    assert oracle.asked[0] == "mug. acorn."


def test_the_model_is_the_paper_s_or_that_of_another_recipe():
    configs = sorted(EVAL.glob("*.py"))
    assert len(configs) >= 7
    outputs = set()
    for path in configs:
        paper, nano = load_config(path), load_config(path, model=NANO)
        assert paper.model.decoder.layer.ffn.router.num_experts == 16
        assert paper.model.backbone.name.startswith("efficientvit_l1")
        assert paper.train.init_checkpoint == "output/dynamic_dino_x16_top2/model_final.pth"
        assert not paper.train.amp.enabled
        assert nano.model == load_config(NANO).model
        assert nano.train.init_checkpoint == "output/nano_x16_drawn/model_final.pth"
        sizes = [loader.mapper.size for loader in nano.dataloader.test.values()]
        assert set(sizes) == {128}
        large = load_config(path, ["inference.size=[800,1333]", "model.canvas=null"])
        for name, loader in large.dataloader.test.items():
            assert loader.mapper.size == [800, 1333]
            assert loader.dataset.names == loader.mapper.dataset
            assert large.dataloader.evaluator[name].dataset_name == loader.dataset.names
        outputs.add(paper.train.output_dir)
    assert len(outputs) == len(configs)


def test_means():
    scores = {"a/AP": 10.0, "a/APs": -1.0, "a/routing/x": 1.0, "b/AP": 30.0, "b/APs": 2.0}
    assert means(scores, {"both": ["a", "b"], "none": ["c"]}) == {"both/AP": 20.0}
    assert means(scores, {"all": ["a", "b", "c"]}) == {"all (2 of 3 sets)/AP": 20.0}
    assert means(scores, {}) == {}
