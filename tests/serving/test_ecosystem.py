"""Detections as other libraries have them, and back; what is written is read by one of them."""

import contextlib
import io
import json
import sys

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from dynamic_dino.modeling.phrases import Phrases
from dynamic_dino.serving.ecosystem import from_supervision, to_coco_results, to_supervision
from dynamic_dino.serving.inference import detection_records
from dynamic_dino.serving.labels import write_labels
from helpers.seeds import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

NAMES = ["red panda", "鲈", "a mug, of tin"]
SIZE = (30, 40)  # height, width


@st.composite
def detections(draw):
    n = draw(st.integers(0, 4))
    corners = [[draw(st.integers(0, 12)), draw(st.integers(0, 12))] for _ in range(n)]
    sides = [[draw(st.integers(3, 17)), draw(st.integers(3, 17))] for _ in range(n)]
    found = Instances(SIZE)
    low = torch.tensor(corners, dtype=torch.float32).reshape(n, 2)
    high = low + torch.tensor(sides, dtype=torch.float32).reshape(n, 2)
    found.pred_boxes = Boxes(torch.cat([low, high], 1))
    found.scores = torch.linspace(0.9, 0.1, n)
    found.pred_classes = torch.tensor([draw(st.integers(0, 2)) for _ in range(n)], dtype=torch.long)
    found.phrases = Phrases(NAMES[c] for c in found.pred_classes)
    if draw(st.booleans()):
        found.track_ids = torch.arange(n)  # 0 is none
    return found


@settings(max_examples=examples(15), deadline=None)
@given(detections())
def test_there_and_back(found):
    pytest.importorskip("supervision")
    theirs = to_supervision(found)
    assert list(theirs.data["class_name"]) == list(found.phrases)
    assert theirs.tracker_id is None or (theirs.tracker_id != 0).all()
    for once, back in ((found, theirs), (found[:1], theirs[:1])):
        back = from_supervision(back, SIZE)
        assert back.image_size == SIZE and back.phrases == once.phrases
        assert back.get_fields().keys() == once.get_fields().keys()
        for field in {*once.get_fields()} - {"phrases", "pred_boxes"}:
            assert torch.equal(back.get(field), once.get(field)), field
        assert torch.equal(back.pred_boxes.tensor, once.pred_boxes.tensor)


def test_what_others_lack_is_said(monkeypatch):
    sv = pytest.importorskip("supervision")
    bare = sv.Detections(xyxy=np.array([[1.0, 2, 3, 4]]), data={"class_name": np.array(["mug"])})
    found = from_supervision(bare, SIZE)
    assert found.scores.tolist() == [1] and found.pred_classes.tolist() == [0]
    assert len(from_supervision(sv.Detections.empty(), SIZE)) == 0
    bare.data = {}
    with pytest.raises(ValueError, match="have no names: set"):
        from_supervision(bare, SIZE)
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install"):
        to_supervision(found)


def test_others_read_what_is_written(tmp_path):
    """supervision reads YOLO, VOC and COCO, pycocotools COCO and results."""
    found = Instances(SIZE)
    found.pred_boxes = Boxes(torch.tensor([[2.0, 3, 20, 28], [5, 5, 39.5, 25.5]]))
    found.scores = torch.tensor([0.75, 0.5])
    found.pred_classes = torch.tensor([0, 2])
    found.phrases = Phrases([NAMES[0], NAMES[2]])
    file = tmp_path / "photo 1.png"
    Image.new("RGB", SIZE[::-1]).save(file)
    result = {"file": str(file), "width": 40, "height": 30, "prompt": NAMES}
    results = [result | {"detections": detection_records(found)}]
    for kind in ("coco", "yolo", "voc"):
        write_labels(results, tmp_path, kind)

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(tmp_path / "coco.json")
        ids = {c["name"]: c["id"] for c in truth.loadCats(truth.getCatIds())}
        entries = json.loads(json.dumps(to_coco_results(found, 1, ids)))
        loaded = truth.loadRes(entries)
    for one, other in zip(loaded.dataset["annotations"], truth.dataset["annotations"], strict=True):
        assert {k: one[k] for k in ("image_id", "category_id", "bbox", "score")} == {
            k: other[k] for k in ("image_id", "category_id", "bbox", "score")
        }
    assert to_coco_results(found, 1, {NAMES[2]: 7})[0]["category_id"] == 7

    sv = pytest.importorskip("supervision")
    read = {
        "coco": sv.DetectionDataset.from_coco(str(tmp_path), str(tmp_path / "coco.json")),
        "yolo": sv.DetectionDataset.from_yolo(
            *(str(tmp_path / "yolo" / part) for part in ("images", "labels", "data.yaml"))
        ),
        "voc": sv.DetectionDataset.from_pascal_voc(
            *(str(tmp_path / "voc" / part) for part in ("JPEGImages", "Annotations"))
        ),
    }
    for kind, dataset in read.items():
        [(_, _, boxes)] = dataset
        names = [dataset.classes[c] for c in boxes.class_id]
        assert names == list(found.phrases), kind
        # supervision takes VOC's last pixel, which lies in the box, for its border
        assert np.abs(boxes.xyxy - found.pred_boxes.tensor.numpy()).max() <= (
            1 if kind == "voc" else 0.01
        ), kind
