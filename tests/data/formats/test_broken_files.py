"""A bad file gives one clear error that names file, place and remedy; `check` finds all of them."""

import json
from pathlib import Path

import pytest
from dynamic_dino.data import datasets
from dynamic_dino.data.__main__ import main
from dynamic_dino.data.check import check_dataset
from helpers import formats

GOOD = [
    formats.Photo("a.jpg", 60, 40, [("red panda", (10, 5, 30, 25)), ("windmill", (1, 2, 9, 9))]),
    formats.Photo("b.jpg", 50, 50, [("traffic light", (10, 5, 30, 25))]),
]


def replace(old: str, new: str):
    def change(file: Path) -> None:
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    return change


def content(change):
    """Changes what a JSON file holds."""

    def edit(file: Path) -> None:
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))

    return edit


def truncate(file: Path) -> None:
    text = file.read_text()
    file.write_text(text[: len(text) * 2 // 3])


def empty(file: Path) -> None:
    file.write_text("")


def not_utf8(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\xe9")


def shape(**fields):
    return content(lambda data: data["shapes"][0].update(fields))


def value(**fields):
    return content(lambda tasks: tasks[0]["annotations"][0]["result"][0]["value"].update(fields))


BOMB = '<!DOCTYPE a [<!ENTITY x "y"><!ENTITY z SYSTEM "file:///etc/passwd">]>\n<annotation>'
GB2312 = '<?xml version="1.0" encoding="gb2312"?>\n<annotation>'
CASES = [
    ("labelimg", "a.xml", empty, r"a\.xml: not valid XML"),
    ("labelme", "a.json", empty, r"a\.json: not valid JSON"),
    ("labelimg", "a.xml", truncate, "not valid XML.*truncated"),
    ("labelimg", "a.xml", replace("<annotation>", "<annotatiom>"), "not valid XML"),
    ("labelimg", "a.xml", replace("<annotation>", BOMB), "DOCTYPE.*remove"),
    ("labelimg", "a.xml", replace("<xmin>11<", "<xmin>left<"), "object 1.*<xmin> is 'left'"),
    ("labelimg", "a.xml", replace("<xmin>11</xmin>", ""), "object 1.*no <bndbox/xmin>: add"),
    ("labelimg", "a.xml", replace("<name>red panda<", "<name><"), "object 1.*no <name>"),
    ("labelimg", "a.xml", replace("<name>red panda<", "<name>-<"), "name '-'.*plain words"),
    ("labelimg", "a.xml", replace("<width>60<", "<width>0<"), "size 0 x 40"),
    ("labelimg", "a.xml", replace("<width>60</width>", ""), "no <size/width>"),
    ("labelimg", "a.xml", replace("<xmax>30<", "<xmax>11<"), None),  # one pixel wide
    ("labelimg", "a.xml", replace("<xmax>30<", "<xmax>5<"), "object 1, image 'a.jpg'.*positive"),
    ("labelimg", "a.xml", replace("<xmin>11<", "<xmin>99<"), "object 1"),
    ("labelimg", "a.jpg", Path.unlink, "a.xml: image .*a.jpg does not exist.*add the file"),
    ("ultralytics", "labels/train/a.txt", replace("0 0.3", "7 0.3"), "line 1: class 7.*0 to 2"),
    ("ultralytics", "labels/train/a.txt", replace("0 0.3", "cat 0.3"), "line 1: 'cat.*correct or"),
    ("ultralytics", "labels/train/a.txt", replace("0 0.3", "0 20.3"), "20.3.* not pixels"),
    ("ultralytics", "labels/train/a.txt", replace("0 0.3", "0 0.9 0.3"), "5 numbers.*confidence"),
    ("ultralytics", "labels/train/a.txt", replace("0 0.3", "0 "), "line 1"),
    ("ultralytics", "images/train/a.jpg", Path.unlink, "labels/train/a.txt: there is no image 'a'"),
    (
        "ultralytics",
        "images/train/a.jpg",
        lambda file: file.write_bytes(b"no picture"),
        "image .*a.jpg can't be read.*replace or remove",
    ),
    (
        "ultralytics",
        "data.yaml",
        replace("names:", "names: 3\nother:"),
        r"data\.yaml: 'names' is 3",
    ),
    (
        "ultralytics",
        "data.yaml",
        replace("train: images/train", "train: gone"),
        r"data\.yaml: 'train' names 'gone'.*correct it",
    ),
    ("ultralytics", "data.yaml", replace("train: images/train", "train: 7"), "write a folder"),
    ("ultralytics", "data.yaml", replace("0: red panda", "0: true"), r"'names' is \{0: True"),
    ("labelimg yolo", "classes.txt", Path.unlink, "add a data.yaml with 'names', or a classes"),
    ("labelme", "a.json", replace('"red panda"', "null"), r"a\.json: shapes\[0\].*no 'label'"),
    ("labelme", "a.json", shape(points=[[1, 2], ["x", 3]]), r"shapes\[0\].*of a rectangle"),
    ("labelme", "a.json", shape(points=[]), r"shapes\[0\]"),
    ("labelme", "a.json", truncate, r"a\.json: not valid JSON.*truncated"),
    ("labelme", "a.json", content(lambda d: d.update(imageWidth="wide")), "size wide x 40"),
    ("labelme", "a.jpg", Path.unlink, r"a\.json: image .*a\.jpg does not exist"),
    ("labelimg yolo", "classes.txt", not_utf8, r"classes\.txt: not text in UTF-8.*save"),
    ("labelimg yolo", "a.txt", not_utf8, r"a\.txt: not text in UTF-8.*save"),
    ("labelme", "a.json", not_utf8, r"a\.json: not text in UTF-8.*save"),
    ("labelimg", "a.xml", replace("<annotation>", GB2312), "a.xml: not valid XML.*encoding"),
    ("cvat", "annotations.xml", truncate, "not valid XML"),
    ("cvat", "annotations.xml", replace('xtl="10.00"', 'xtl="x"'), "image 'a.jpg', shape 1.*xtl"),
    ("cvat", "annotations.xml", replace('xtl="10.00"', ""), "shape 1 <box>: xtl is None"),
    ("cvat", "annotations.xml", replace('label="red panda"', ""), "shape 1.*name None"),
    ("cvat", "annotations.xml", replace('width="60"', 'width="-1"'), "size -1 x 40"),
    ("cvat", "annotations.xml", replace("<image ", "<track/><image "), "of a video.*images 1.1"),
    ("cvat", "images/a.jpg", Path.unlink, "image 'a.jpg': image .*a.jpg does not exist"),
    ("label studio", "*.json", value(rotation="steep"), "task 1, result 1.*per cent"),
    (
        "label studio",
        "*.json",
        content(lambda d: d[0]["annotations"][0].update(result=3)),
        "task 1: 'result' is 3, no list",
    ),
    (
        "label studio",
        "*.json",
        content(lambda d: d[0]["annotations"][0]["result"].append(3)),
        r"task 1: result\[2\] is 3, no object",
    ),
    (
        "label studio",
        "*.json",
        content(lambda d: d[0]["annotations"][0].update(was_cancelled="maybe")),
        "task 1: 'was_cancelled' is 'maybe': write 0 or 1",
    ),
    ("label studio", "*.json", value(y=True), "task 1, result 1.*per cent"),
    ("labelme", "a.json", shape(points=[[1, True], [2, 3]]), r"shapes\[0\].*of a rectangle"),
    ("csv", "labels.csv", replace("panda,10,5,30,25", "panda,10"), "line 2: it has 5 of 8 col"),
    (
        "roboflow",
        "train/*.json",
        content(lambda d: d["images"][0].update(file_name=7)),
        r"images\[0\].*'file_name' is 7: write a path",
    ),
    (
        "roboflow",
        "train/*.json",
        content(lambda d: d["annotations"][1].update(image_id=[])),
        r"annotations\[1\].*'image_id' is \[\]: write a whole number",
    ),
    ("label studio", "*.json", value(x="left"), "task 1, result 1.*per cent"),
    ("label studio", "*.json", value(rectanglelabels=[]), "task 1, result 1.*no label"),
    ("label studio", "*.json", value(rectanglelabels=["."]), "task 1, result 1.*name '.'"),
    ("label studio", "*.json", content(lambda d: d[0]["data"].clear()), "task 1: it has no field"),
    ("label studio", "*.json", value(x=120), "task 1, result 1, image 'a.jpg'.*outside"),
    ("label studio", "a.jpg", Path.unlink, "task 1: image .*0a1b2c3d-a.jpg"),
    ("csv", "labels.csv", replace("10,5,30", "10,,30"), "line 2: ymin is ''"),
    ("csv", "labels.csv", replace("10,5,30", "10,high,30"), "line 2: ymin is 'high'"),
    ("csv", "labels.csv", replace("red panda", ""), "line 2: name ''"),
    ("csv", "labels.csv", replace("a.jpg,60,40,red", ",60,40,red"), "line 2: it names no image"),
    ("csv", "labels.csv", replace("60,40", "60,no"), "line 2: size 60 x no"),
    ("csv", "labels.csv", replace("10,5,30,25", "30,25,29,15"), "line 2.*x, y, width, height"),
    ("csv", "a.jpg", Path.unlink, "line 2: image .*a.jpg does not exist"),
    ("csv", "labels.csv", not_utf8, r"labels\.csv: not text in UTF-8"),
    ("retinanet", "annotations.csv", replace("1,2,9", "1,x,9"), "line 2: ymin is 'x'"),
]


@pytest.mark.parametrize("writer, file, spoil, message", CASES)
def test_a_mistake_names_its_place_and_remedy(writer, file, spoil, message, tmp_path):
    path = formats.WRITERS[writer](tmp_path / "mine", GOOD)
    (target,) = (tmp_path / "mine").glob(file)
    spoil(target)
    if message is None:
        assert len(datasets.load_datasets(str(path))) == 2
        return
    with pytest.raises(ValueError, match=message) as error:
        datasets.load_datasets(str(path))
    assert str(tmp_path) in str(error.value)  # the file, wherever it is
    result = check_dataset(str(path))
    assert not result.ok and result.counts.total() >= 1


def test_check_finds_all_mistakes(tmp_path, capsys):
    photos = [formats.Photo(f"{i}.jpg", 60, 40, [("cat", (10, 5, 30, 25))]) for i in range(8)]
    path = formats.write_labelimg(tmp_path, photos)
    truncate(tmp_path / "0.xml")
    replace("<xmin>11<", "<xmin>x<")(tmp_path / "1.xml")
    replace("<xmax>30<", "<xmax>10<")(tmp_path / "2.xml")
    (tmp_path / "3.jpg").unlink()
    (tmp_path / "4.jpg").write_bytes(b"no picture")
    assert main(["check", str(path), "--images", "all"]) == 1
    report = capsys.readouterr().out
    for word in (
        "unreadable file: 1",
        "malformed box: 1",
        "empty box: 1",
        "missing image: 1",
        "bad image: 1",
        "6 images, 4 boxes, 1 names",
        "NOT good",
    ):
        assert word in report
    replace("<xmax>30<", "<xmax>10<")(tmp_path / "5.xml")
    for name in ("0.xml", "1.xml", "3.xml", "2.xml", "2.jpg"):
        (tmp_path / name).unlink()
    out = tmp_path / "out/a.json"
    command = ["convert", str(path), str(out), "--to", "coco", "--bad-boxes"]
    assert main([*command, "error"]) == 1 and not out.exists()
    assert main([*command, "drop"]) == 0


def test_an_image_that_is_annotated_twice(tmp_path):
    formats.write_labelme(tmp_path, GOOD)
    (tmp_path / "copy.json").write_text((tmp_path / "a.json").read_text())
    with pytest.raises(ValueError, match=r"copy\.json: image a\.jpg is annotated twice.*a\.json"):
        datasets.load_datasets(str(tmp_path))


def test_images_that_nobody_annotated_are_said(tmp_path, capsys):
    formats.write_labelimg(tmp_path / "voc", GOOD)
    formats.write_labelme(tmp_path / "labelme", GOOD)
    formats.write_labelimg_yolo(tmp_path / "yolo", GOOD)
    for folder in ("voc", "labelme", "yolo"):
        formats.draw(tmp_path / folder, [formats.Photo("new.jpg", 30, 30)])
        (tmp_path / folder / "new.jxl").touch()
        assert main(["check", str(tmp_path / folder)]) == 0
    report = capsys.readouterr().out
    assert report.count("left out 1 images that aren't read (new.jxl, ...: convert it to") == 3
    assert "left out 1 images without an XML file" in report
    assert "left out 1 images without a JSON file" in report
    assert "3 images, 3 boxes, 3 names; 1 images without a label file, taken as empty" in report


def test_a_part_that_is_named_is_never_drawn_from_another(tmp_path):
    path = formats.write_ultralytics(tmp_path / "mine", GOOD)
    replace("\nval:", "\nval: gone")(path / "data.yaml")
    assert len(datasets.load_datasets(f"{path}:train").boxes) == 3
    with pytest.raises(ValueError, match=r"data\.yaml: 'val' names 'gone'.*or remove it"):
        datasets.load_datasets(f"{path}:val")


def test_settings_of_yolo_that_windows_wrote(tmp_path):
    path = formats.write_ultralytics(tmp_path / "mine", GOOD)
    lines = (path / "data.yaml").read_text().replace(str(path), "C:\\me\\mine")
    (path / "data.yaml").write_text(lines.replace("images/train", "..\\images\\train"))
    assert len(datasets.load_datasets(str(path)).boxes) == 3
    names = [f"C:\\me\\mine\\images\\train\\{photo.name}" for photo in GOOD]
    (path / "train.txt").write_text("\n".join(names))
    (path / "data.yaml").write_text(lines.replace("images/train", "train.txt"))
    assert len(datasets.load_datasets(str(path)).boxes) == 3


def test_two_lists_of_names(tmp_path):
    path = formats.write_labelimg_yolo(tmp_path / "mine", GOOD)
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n")
    assert main(["check", str(path)]) == 0  # that of the folder counts
    (path / "obj.names").write_text("cat\ndog\nbird\n")
    with pytest.raises(ValueError, match="name the classes in two ways"):
        datasets.load_datasets(str(path))
