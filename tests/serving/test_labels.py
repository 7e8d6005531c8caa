"""What predict.py writes as annotations is read back by the readers of data sets, boxes and names
equal."""

import json
import xml.etree.ElementTree as ET

import pytest
from dynamic_dino.data.datasets import get_metadata, load_datasets
from dynamic_dino.serving.labels import write_labels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

NAMES = ["red panda", "鲈", "<mug> & 'cup', \"#1\"", "yes", "007", "a: b"]
TENTHS = st.integers(0, 400).map(lambda n: n / 10)  # as predict.py rounds


@st.composite
def results(draw):
    def found():
        x, y = sorted(draw(st.tuples(TENTHS, TENTHS))), sorted(draw(st.tuples(TENTHS, TENTHS)))
        box = [x[0], y[0], x[1] + 0.1, y[1] + 0.1]
        return {"phrase": draw(st.sampled_from(NAMES)), "score": 0.5, "box": box}

    return [
        {
            "file": name,
            "width": 41,
            "height": 41,
            "prompt": NAMES,
            "picture": f"{i}.png",
            "detections": [found() for _ in range(draw(st.integers(0, 3)))],
        }
        for i, name in enumerate(["a b.jpg", "sub/ü#%.png"])
    ]


def as_annotations(tasks):
    """Label Studio's predictions once somebody has accepted them."""
    return [{"data": t["data"], "annotations": t["predictions"]} for t in tasks]


@pytest.mark.parametrize("kind", ["coco", "yolo", "label-studio"])
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(found=results())
def test_round_trips(tmp_path_factory, kind, found):
    folder = tmp_path_factory.mktemp("labels")
    (folder / "sub").mkdir()
    for result in found:
        result["file"] = str(folder / result["file"])
        Image.new("RGB", (41, 41)).save(result["file"])
    path = write_labels(found, folder, kind)
    if kind == "label-studio":
        tasks = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(as_annotations(tasks)), encoding="utf-8")
        labels = ET.parse(folder / "label_studio.xml").getroot().iter("Label")
        assert [label.get("value") for label in labels] == NAMES
    source = str(path) + (":train" if kind == "yolo" else "")
    records = load_datasets(source)
    classes = get_metadata(source).thing_classes
    if kind != "label-studio":  # whose names are those of its results
        assert list(classes) == NAMES
    read = [
        [(classes[a["category_id"]], *(round(v, 1) for v in a["bbox"])) for a in r["annotations"]]
        for r in records
    ]
    wanted = [
        [
            (d["phrase"], x0, y0, round(x1 - x0, 1), round(y1 - y0, 1))
            for d in result["detections"]
            for x0, y0, x1, y1 in [d["box"]]
        ]
        for result in found
    ]
    assert sorted(map(sorted, read)) == sorted(map(sorted, wanted))
