"""COCO JSON as annotation tools export it, with the names that nothing is annotated with."""

import json

import numpy as np
import pytest
from dynamic_dino.data import datasets
from dynamic_dino.data.check import check_dataset
from dynamic_dino.data.ground_truth import ground_truth
from dynamic_dino.data.mapper import TestMapper, TrainMapper
from dynamic_dino.evaluation.coco import coco_ap, read_ground_truth
from helpers import miniatures
from PIL import Image


def write(folder, file, images, categories, annotation) -> str:
    """Two pictures, each with a box of the last two categories."""
    entries, annotations = [], []
    for i, name in enumerate(images):
        path = (folder / file).parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40), "gray").save(path)
        entries.append({"id": i, "file_name": name, "width": 60, "height": 40})
        for k, category in enumerate(categories[-2:]):
            box = {"id": len(annotations), "image_id": i, "bbox": [5 + 20 * k, 4, 12.5, 9 + i]}
            annotations.append(box | {"category_id": category["id"], "iscrowd": 0} | annotation)
    content = {"images": entries, "categories": categories, "annotations": annotations}
    (folder / file).write_text(json.dumps({"info": {}, "licenses": []} | content))
    return str(folder)


def roboflow(folder):
    names = [("fish", "none"), ("salmon", "fish"), ("trout", "fish")]
    categories = [{"id": i, "name": n, "supercategory": s} for i, (n, s) in enumerate(names)]
    images = ["a_jpg.rf.0a1b.jpg", "b_jpg.rf.2c3d.jpg"]
    more = {"area": 100, "segmentation": []}
    return write(folder, "train/_annotations.coco.json", images, categories, more)


def label_studio(folder):
    categories = [{"id": i, "name": name} for i, name in enumerate(("Fish", "salmon", "trout"))]
    images = ["images/0a1b2c3d-a.jpg", "images/4e5f6a7b-b.jpg"]
    more = {"ignore": 0, "segmentation": [], "area": 112.5}
    return write(folder, "result.json", images, categories, more)


def cvat(folder):
    categories = [
        {"id": i, "name": name, "supercategory": ""}
        for i, name in enumerate(("Unbenannt", "Eisvogel (blau)", "Rotkehlchen"), start=1)
    ]
    more = {"attributes": {"occluded": False, "track_id": 0, "keyframe": True}, "area": 112.5}
    return write(folder, "instances_default.json", ["a.png", "b.png"], categories, more)


def chinese(folder):
    categories = [{"id": i, "name": name} for i, name in ((7, "动物"), (8, "红熊猫"), (9, "风车"))]
    return write(folder, "标注.json", ["图 1.jpg", "图 2.jpg"], categories, {"segmentation": []})


@pytest.mark.parametrize("export", [roboflow, label_studio, cvat, chinese])
def test_names_that_nothing_is_annotated_with(export, tmp_path):
    path = export(tmp_path / "mine")
    result = check_dataset(path, images=None)
    assert result.ok and (result.images, result.boxes) == (2, 4), [*result.lines()]
    content = json.loads(next((tmp_path / "mine").rglob("*.json")).read_text())
    group, *names = (category["name"] for category in content["categories"])
    assert repr(group) in "\n".join(result.lines())

    records = datasets.load_datasets(path)
    training, testing = TrainMapper(path, 60, max_phrases=9), TestMapper(path, 60)
    for record in records:
        prompt = training(record, np.random.default_rng(0))["prompt"]
        assert sorted(prompt.phrases) == sorted(names)
        assert testing(record)["prompt"].phrases == names
    truth = read_ground_truth(ground_truth(path))
    found = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1}
        for a in truth["annotations"]
    ]
    assert coco_ap(ground_truth(path), found).metrics["AP"] == pytest.approx(100)


def test_built_in_data_sets_ask_for_all_names(tmp_path, rng, monkeypatch):
    """As their protocols do: few pictures don't show all."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    miniatures.write_coco(tmp_path, rng, "val", count=1)
    [record] = datasets.load_file(datasets.locate_dataset("coco_2017_val"))
    names = datasets.get_metadata("coco_2017_val").thing_classes
    assert len({a["category_id"] for a in record["annotations"]}) < len(names)
    assert TestMapper("coco_2017_val", 60)(record)["prompt"].phrases == names
    mapper = TrainMapper("coco_2017_val", 60, max_phrases=len(names))
    assert {*mapper(record, rng)["prompt"].phrases} == {*names}
