"""What is written as annotations is read back by the readers of data sets, with the same boxes."""

import json
import os
import xml.etree.ElementTree as ET

import pytest
from dynamic_dino.data.datasets import get_metadata, load_datasets
from dynamic_dino.serving.labels import one_line, write_labels
from helpers.seeds import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

NAMES = ["red panda", "鲈", "<mug> & 'cup', \"#1\"", "yes", "007", "a: b", "No. 2, pencil"]
FILES = ["a b.jpg", "sub/ü#%.png", "sub/a b.jpg", "sub/a b.png", "turned.jpg"]
WIDTH, HEIGHT = 41, 30
TURNED = Image.Exif()
TURNED[0x0112] = 6  # to be shown turned by 90 degrees


def sides(low, high):
    """Of a box, in pixels; a tenth is what predict.py rounds to."""
    values = st.integers(low * 10, high * 10).map(lambda n: n / 10)
    return st.tuples(values, values).map(sorted)


@st.composite
def results(draw):
    def found():  # now and then beyond the border, or without an area
        x, y = draw(sides(-2, WIDTH + 2)), draw(sides(-2, HEIGHT + 2))
        name = draw(st.sampled_from(NAMES))
        return {"phrase": name, "score": 0.5, "box": [x[0], y[0], x[1], y[1]]}

    return [
        {
            "file": name,
            "width": WIDTH,
            "height": HEIGHT,
            "prompt": NAMES,
            "detections": [found() for _ in range(draw(st.integers(0, 3)))],
        }
        for name in FILES
    ]


def save_pictures(folder, found):
    (folder / "sub").mkdir()
    for result in found:
        turned = result["file"] == "turned.jpg"
        result["file"] = str(folder / result["file"])
        size = (HEIGHT, WIDTH) if turned else (WIDTH, HEIGHT)
        Image.new("RGB", size).save(result["file"], **({"exif": TURNED} if turned else {}))


def clipped(found):
    for d in found["detections"]:
        x0, y0, x1, y1 = (
            min(max(v, 0), side) for v, side in zip(d["box"], (WIDTH, HEIGHT) * 2, strict=True)
        )
        if x1 > x0 and y1 > y0:
            yield d["phrase"], x0, y0, x1, y1


def accept(path):
    """Label Studio's predictions once somebody has accepted them."""
    tasks = json.loads(path.read_text(encoding="utf-8"))
    content = [{"data": t["data"], "annotations": t["predictions"]} for t in tasks]
    path.write_text(json.dumps(content), encoding="utf-8")


def read_back(path, kind):
    """[(name, x0, y0, x1, y1), ...] of each image, and the classes, by the reader of data sets."""
    source = str(path) + (":train" if kind == "yolo" else "")
    records = load_datasets(source)
    classes = list(get_metadata(source).thing_classes)
    boxes = []
    for record in records:
        assert (record["width"], record["height"]) == (WIDTH, HEIGHT)
        found = [(a["bbox"], classes[a["category_id"]]) for a in record["annotations"]]
        boxes.append([(name, x, y, x + w, y + h) for (x, y, w, h), name in found])
    return boxes, classes


@pytest.mark.parametrize("kind", ["coco", "yolo", "voc", "labelme", "label-studio"])
@settings(
    max_examples=examples(4),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(found=results())
def test_round_trips(tmp_path_factory, kind, found):
    folder = tmp_path_factory.mktemp("labels")
    save_pictures(folder, found)
    path = write_labels(found, folder / "out", kind)
    if kind == "label-studio":
        if not any(r["detections"] for r in found):
            return  # tasks without a box, and so without a name
        accept(path)
        labels = ET.parse(path.with_suffix(".xml")).getroot().iter("Label")
        assert [label.get("value") for label in labels] == NAMES
    read, classes = read_back(path, kind)
    wanted = [list(clipped(result)) for result in found]
    if kind in ("coco", "yolo"):  # whose names aren't only those of their boxes
        assert classes == NAMES
    if kind in ("yolo", "voc", "labelme"):
        order = sorted(range(len(FILES)), key=lambda i: FILES[i].replace("/", "__"))
        wanted = [wanted[i] for i in order]  # by the names of the copies
    rounding = 1 if kind == "voc" else 0.02
    for one, other in zip(read, wanted, strict=True):
        assert [name for name, *_ in one] == [name for name, *_ in other]
        for (_, *box), (_, *true) in zip(one, other, strict=True):
            assert box == pytest.approx(true, abs=rounding)


def test_folders_of_labels(tmp_path):
    """An image that was looked at twice is there once; corrections of a former run are kept, what
    is unchanged isn't there twice; names that no format can hold become lines; paths of any length
    and images without an ending have a place."""
    deep = tmp_path / "/".join(["鲈" * 40] * 3)
    deep.mkdir(parents=True)
    files = [deep / "a.jpg", deep / "b.JPG", tmp_path / ".hidden.jpg"]
    for file in files:
        Image.new("RGB", (WIDTH, HEIGHT)).save(file)

    def result(file, name, box):
        detections = [{"phrase": name, "score": 0.25, "box": box}]
        size = {"width": WIDTH, "height": HEIGHT}
        return size | {"file": str(file), "prompt": [name], "detections": detections}

    boxes = [[1, 2, 30, 20], [5, 5, 9, 9]]
    found = [result(file, "cow\n \x07 fly", boxes[0]) for file in files]
    found.append(result(files[0], "mug", boxes[1]))
    out = tmp_path / "out"
    (out / "yolo.1-a.partial").mkdir(parents=True)  # of a process that works at the same time
    for kind in ("yolo", "voc", "labelme", "coco"):
        path = write_labels(found, out, kind)
        read, classes = read_back(path, kind)
        assert classes == ["cow fly", "mug"] == [*map(one_line, ("cow\n \x07 fly", "mug"))]
        assert sorted(map(len, read)) == [1, 1, 2]
        assert {box[1:] for image in read for box in image} == {*map(tuple, boxes)}
    names = os.listdir(out / "yolo/images")
    assert max(len(os.fsencode(name)) for name in names) < 255 and "hidden.jpg" in names
    assert [os.stat(p).st_nlink for p in (out / "labelme").glob("*.jpg")] == [4] * 2

    write_labels(found, out, "yolo")
    assert not (out / "yolo.1").exists(), "nothing had changed"
    assert [path.name for path in out.glob("*.partial")] == ["yolo.1-a.partial"]
    label = out / "yolo/labels/hidden.txt"
    label.write_text("0 0.5 0.5 1 1\n")
    write_labels(found, out, "yolo")
    assert (out / "yolo.1/labels/hidden.txt").read_text() == "0 0.5 0.5 1 1\n"
    assert label.read_text() != "0 0.5 0.5 1 1\n"
