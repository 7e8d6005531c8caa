"""What tools write is read to the same boxes, in each of their formats."""

import json
from pathlib import Path

import numpy as np
import pytest
from dynamic_dino.data import datasets
from dynamic_dino.data.__main__ import main
from dynamic_dino.data.ground_truth import ground_truth
from dynamic_dino.evaluation.cli import main as score
from dynamic_dino.evaluation.coco import coco_ap, read_ground_truth
from helpers import formats
from helpers.seeds import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

FORMAT_OF = {
    "voc": "voc",
    "labelimg": "voc",
    "ultralytics": "yolo",
    "yolo segments": "yolo",
    "labelimg yolo": "yolo",
    "cvat yolo": "yolo",
    "labelme": "labelme",
    "cvat": "cvat",
    "label studio": "labelstudio",
    "label studio min": "labelstudio",
    "roboflow": "coco",
    "csv": "csv",
    "retinanet": "csv",
}


def expected(writer: str, photos: list[formats.Photo]) -> dict:
    if writer == "csv":
        photos = [photo for photo in photos if photo.boxes]
    boxes = formats.truth(photos)
    if "label studio" in writer:
        boxes = {name.replace(" ", "_"): value for name, value in boxes.items()}
    return boxes


def read(path: Path | str) -> tuple[dict, list[str]]:
    records = datasets.load_datasets(str(path))
    names = datasets.get_metadata(str(path)).thing_classes
    return formats.found(records, names), names


@pytest.mark.parametrize("writer", formats.WRITERS)
def test_every_format_gives_the_same_boxes(writer, tmp_path, rng):
    photos = formats.photos(rng)
    path = formats.WRITERS[writer](tmp_path / "mine", photos)
    assert datasets.locate_dataset(str(path)).format == FORMAT_OF[writer]
    boxes, names = read(path)
    assert boxes == expected(writer, photos)
    assert names == list(formats.NAMES)


@pytest.mark.parametrize("writer", formats.WRITERS)
def test_check_show_and_convert_take_it(writer, tmp_path, rng, capsys):
    photos = formats.photos(rng)
    path = formats.WRITERS[writer](tmp_path / "mine", photos)
    assert main(["check", str(path), "--images", "all"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    count = sum(len(boxes) for boxes in expected(writer, photos).values())
    images = len(expected(writer, photos))
    assert f"{images} images, {count} boxes, 3 names" in line
    sheet, target = tmp_path / "look.png", tmp_path / "out/all.json"
    assert main(["show", str(path), "--out", str(sheet)]) == 0 and sheet.is_file()
    assert main(["convert", str(path), str(target), "--to", "coco"]) == 0
    assert f"{images} images, {count} boxes" in capsys.readouterr().out
    assert read(target) == read(path)  # its names of images are relative to it
    assert main(["check", str(target)]) == 0


@pytest.mark.parametrize("writer", ["voc", "ultralytics", "label studio", "cvat", "roboflow"])
@pytest.mark.parametrize("part", ["", ":val"])
def test_an_evaluation_has_its_ground_truth(writer, part, tmp_path, rng, capsys):
    photos = formats.photos(rng, 10)
    path = str(formats.WRITERS[writer](tmp_path / "mine", photos)) + part
    truth = read_ground_truth(ground_truth(path))
    assert [category["name"] for category in truth["categories"]] == list(formats.NAMES)
    perfect = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for a in truth["annotations"]
    ]
    assert coco_ap(truth, perfect).metrics["AP"] == pytest.approx(100)
    saved = tmp_path / "predictions.json"
    saved.write_text(json.dumps(perfect))
    assert score([str(saved), "--dataset", path]) == 0
    assert "100.0" in capsys.readouterr().out


boxes = st.tuples(*[st.integers(0, 60)] * 4).map(
    lambda v: (min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]) + 1, max(v[1], v[3]) + 1)
)


@pytest.mark.parametrize(
    "writer", ["voc", "ultralytics", "labelme", "cvat", "label studio", "label studio min", "csv"]
)
@settings(
    max_examples=examples(15),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(drawn=st.lists(st.tuples(st.sampled_from(formats.NAMES), boxes), min_size=1, max_size=6))
def test_any_boxes(writer, drawn, tmp_path_factory):
    photos = [formats.Photo("a.png", 61, 67, drawn)]
    path = formats.WRITERS[writer](tmp_path_factory.mktemp("any") / "mine", photos)
    found = read(path)[0]["a.png"]
    assert [name for name, _ in found] == [name for name, _ in formats.truth(photos)["a.png"]]
    for (_, box), (_, other) in zip(found, formats.truth(photos)["a.png"], strict=True):
        np.testing.assert_allclose(box, other, atol=0.01)


def test_voc_counts_from_zero_where_a_set_has_zeros_or_fractions(tmp_path):
    photo = formats.Photo("a.jpg", 50, 40, [("cat", (3, 4, 20, 30)), ("dog", (0, 5, 9, 9))])
    path = formats.write_voc(tmp_path / "zeros", [photo], from_one=0)
    assert read(path)[0] == formats.truth([photo])
    place = datasets.locate_dataset(str(path))
    assert "pixels counted from 0" in datasets.describe(place, datasets.load_file(place))
    photo.boxes = [("cat", (3.0, 4.0, 20.0, 30.0)), ("dog", (2.0, 5.0, 9.0, 9.0))]
    path = formats.write_voc(tmp_path / "fractions", [photo], from_one=0)
    assert read(path)[0] == formats.truth([photo])
    other = formats.Photo("b.jpg", 50, 40, [("cat", (3, 4, 20, 30))])  # of another tool
    formats.draw(path / "JPEGImages", [other])
    (path / "Annotations/b.xml").write_text(formats.voc_xml(other))
    assert read(path)[0] == formats.truth([photo, other])


def test_a_stale_filename_in_voc_gives_way_to_the_name_of_the_file(tmp_path):
    photos = [formats.Photo(f"{name}.jpg", 50, 40, [("cat", (3, 4, 20, 30))]) for name in "ab"]
    path = formats.write_voc(tmp_path, photos)
    file = path / "Annotations/b.xml"
    file.write_text(file.read_text().replace("b.jpg", "a.jpg"))
    assert read(path)[0] == formats.truth(photos)


def test_cvat_shapes(tmp_path):
    photo = formats.Photo("a.jpg", 100, 80)
    shapes = """
      <polygon label="a" points="10.00,20.00;30.00,5.00;20.00,40.00" z_order="0"></polygon>
      <box label="b" xtl="20" ytl="30" xbr="60" ybr="50" rotation="90.00"></box>
      <ellipse label="c" cx="50" cy="40" rx="20" ry="10" rotation="90"></ellipse>
      <mask label="d" rle="0, 20" left="5" top="6" width="4" height="5"></mask>
      <points label="a" points="1,1;2,2"></points>
      <tag label="a"></tag>
    """
    formats.draw(tmp_path, [photo])
    file = tmp_path / "annotations.xml"
    file.write_text(formats.cvat_xml(formats.cvat_image(0, photo, shapes)))
    boxes, names = read(file)
    assert boxes["a.jpg"] == [
        ("a", (10, 5, 30, 40)),
        ("b", (30, 20, 50, 60)),
        ("c", (40, 20, 60, 60)),
        ("d", (5, 6, 9, 11)),
    ]
    assert names == [*formats.NAMES, "a", "b", "c", "d"]  # the task's labels first
    place = datasets.locate_dataset(str(file))
    line = datasets.describe(place, datasets.load_file(place))
    assert "left out 1 points, lines, cuboids or skeletons" in line


def test_labelme_shapes(tmp_path):
    photo = formats.Photo("a.jpg", 100, 80)
    path = formats.write_labelme(tmp_path, [photo])
    content = json.loads((path / "a.json").read_text())
    content["imagePath"] = "..\\elsewhere\\a.jpg"
    content["shapes"] = [
        formats.labelme_shape("ball", [(50, 40), (50, 60)], "circle"),
        formats.labelme_shape("blob", [(5, 6), (9, 11)], "mask"),
        formats.labelme_shape("dot", [(5, 6)], "point"),
        formats.labelme_shape("road", [(5, 6), (7, 8), (9, 9)], "linestrip"),
    ]
    (path / "a.json").write_text(json.dumps(content))
    boxes, names = read(path)
    assert boxes["a.jpg"] == [("ball", (30, 20, 70, 60)), ("blob", (5, 6, 9, 11))]
    assert names == ["ball", "blob"]


def test_label_studio_shapes_and_annotators(tmp_path):
    photo = formats.Photo("a b.jpg", 200, 100)
    formats.draw(tmp_path / "deep", [photo])
    value = {"x": 10, "y": 20, "width": 30, "height": 40}
    size = {"original_width": 200, "original_height": 100}

    def annotation(*values, **fields):
        result = [{"id": f"r{i}", "type": "x", "value": v, **size} for i, v in enumerate(values)]
        return {"result": result, "was_cancelled": False, **fields}

    good = annotation(
        value | {"rectanglelabels": ["box", "thing"], "rotation": 90},
        {"points": [[10, 10], [20, 10], [15, 50]], "polygonlabels": ["shape"]},
        {"x": 50, "y": 50, "radiusX": 10, "radiusY": 30, "ellipselabels": ["oval"]},
        {"x": 5, "y": 5, "width": 1, "keypointlabels": ["dot"]},
        {"format": "rle", "rle": [1, 2], "brushlabels": ["paint"]},
        {"choices": ["sunny"]},
        ground_truth=True,
    )
    other = annotation(value | {"rectanglelabels": ["wrong"]})
    # <Rectangle> with <Labels>: two results of one shape
    pair = annotation(value, value | {"labels": ["pair"]})
    pair["result"][1]["id"] = "r0"
    tasks = [
        {"id": 1, "data": {"image": "/data/local-files/?d=deep/a%20b.jpg"}, "annotations": []},
        {"id": 2, "data": {"image": "s3://bucket/deep/a b.jpg"}, "annotations": [other, good]},
    ]
    file = tmp_path / "export.json"
    file.write_text(json.dumps(tasks))
    boxes, names = read(file)
    assert boxes["a b.jpg"] == [
        ("box", (0, 20, 20, 80)),  # turned about its corner, over the border
        ("oval", (80, 20, 120, 80)),
        ("shape", (20, 10, 40, 50)),
        ("thing", (0, 20, 20, 80)),
    ]
    place = datasets.locate_dataset(str(file))
    line = datasets.describe(place, datasets.load_file(place))
    for note in ("1 tasks that nobody annotated", "1 tasks have several", "3 results that have no"):
        assert note in line
    tasks[1]["annotations"] = [pair]
    file.write_text(json.dumps(tasks[1:]))
    assert read(file)[0]["a b.jpg"] == [("pair", (20, 20, 80, 60))]


def test_a_data_yaml_may_say_nothing_but_the_names(tmp_path, rng):
    photos = formats.photos(rng)
    path = formats.write_ultralytics(tmp_path, photos)
    (path / "data.yaml").write_text(f"nc: 3\nnames: {list(formats.NAMES)}\n")
    assert read(path)[0] == formats.truth(photos)


def test_poses_of_yolo_have_their_box(tmp_path):
    photo = formats.Photo("a.jpg", 100, 80, [("red panda", (10, 20, 30, 40))])
    path = formats.write_ultralytics(tmp_path, [photo])
    labels = tmp_path / "labels/train/a.txt"
    labels.write_text(labels.read_text() + " 0.2 0.3 2 0.1 0.1 0")
    yaml = tmp_path / "data.yaml"
    yaml.write_text(yaml.read_text() + "kpt_shape: [2, 3]\n")
    assert read(path)[0] == formats.truth([photo])


def test_columns_of_a_csv_in_any_order_and_of_other_names(tmp_path):
    photo = formats.Photo("a.jpg", 100, 80, [("red; panda", (10, 20, 30, 40))])
    formats.draw(tmp_path, [photo])
    rows = [["label", "y1", "x1", "y2", "x2", "score", "image_path"]]
    rows += [["red; panda", 20, 10, 40, 30, 0.5, "C:\\photos\\a.jpg"]]
    file = formats.write_rows(tmp_path / "a.csv", rows, ";")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # as Excel saves it
    assert read(file)[0] == formats.truth([photo])


def test_sizes_come_from_the_file_turned_as_exif_says(tmp_path):
    photo = formats.Photo("a.jpg", 40, 100, [("red panda", (10, 20, 30, 40))])
    path = formats.write_ultralytics(tmp_path, [photo])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 40)).save(tmp_path / "images/train/a.jpg", exif=exif)
    record = datasets.load_datasets(str(path))[0]
    assert (record["width"], record["height"]) == (40, 100)
    assert read(path)[0] == formats.truth([photo])
    assert main(["check", str(path), "--images", "all"]) == 0


def test_roboflows_group_is_left_out_and_said(tmp_path, rng, capsys):
    path = formats.write_roboflow(tmp_path, formats.photos(rng))
    assert main(["check", str(path)]) == 0
    assert "left out the name 'things', of a group without boxes" in capsys.readouterr().out
    file = path / "train/_annotations.coco.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["category_id"] = 0  # then it is a name like others
    file.write_text(json.dumps(content))
    assert datasets.load_datasets(str(path)) is not None
    assert datasets.get_metadata(str(path)).thing_classes == ["things", *formats.NAMES]


def test_plain_coco_keeps_names_without_boxes(tmp_path, rng):
    path = formats.write_roboflow(tmp_path, formats.photos(rng))
    file = path / "train/_annotations.coco.json"
    content = json.loads(file.read_text())
    content["categories"][0]["supercategory"] = "root"
    file.write_text(json.dumps(content))
    assert datasets.get_metadata(str(path)).thing_classes == ["things", *formats.NAMES]
