"""A validation part by seed."""

import json

import numpy as np
import pytest
from dynamic_dino.data import datasets
from dynamic_dino.data.__main__ import main
from dynamic_dino.data.ground_truth import ground_truth
from dynamic_dino.data.split import split_rows
from helpers import formats, miniatures


def many(count: int = 100) -> list[formats.Photo]:
    """Every photo has "a", each tenth "b", two "c", one "d"; five have nothing."""
    photos = []
    for i in range(count):
        names = ["a"] + ["b"] * (i % 10 == 0) + ["c"] * (i in (7, 8)) + ["d"] * (i == 9)
        boxes = [(name, (5 * k, 1, 5 * k + 4, 9)) for k, name in enumerate(names)]
        photos.append(formats.Photo(f"{i}.png", 30, 30, boxes if i < count - 5 else []))
    return photos


def test_every_name_is_in_both_parts_in_its_share(tmp_path):
    records = datasets.load_datasets(str(formats.write_retinanet(tmp_path, many())))
    for seed in range(5):
        train, val = split_rows(records, 0.2, seed)
        assert sorted([*train, *val]) == list(range(100))
        assert 17 <= len(val) <= 23
        in_val = [names_in(records, val, k) for k in range(4)]
        assert 17 <= in_val[0] <= 21 and in_val[1] == 2 and in_val[2] <= 1 and in_val[3] == 0
    again = split_rows(records, 0.2, 4)
    assert np.array_equal(again[0], train)
    assert not np.array_equal(split_rows(records, 0.2, 5)[1], val)


def test_many_rare_names_leave_a_val_part(tmp_path):
    names = [f"name {i // 2}" for i in range(40)]
    photos = [formats.Photo(f"{i}.png", 30, 30, [(n, (1, 1, 9, 9))]) for i, n in enumerate(names)]
    records = datasets.load_datasets(str(formats.write_retinanet(tmp_path, photos)))
    train, val = split_rows(records)
    assert len(val) == 8 and len(train) == 32
    assert {records[int(i)]["annotations"][0]["category_id"] for i in train} == set(range(20))


def names_in(records, rows, name) -> int:
    return sum(name in {a["category_id"] for a in records[int(i)]["annotations"]} for i in rows)


def test_few_images(tmp_path):
    photos = [formats.Photo(f"{i}.png", 30, 30, [("a", (1, 1, 9, 9))]) for i in range(2)]
    records = datasets.load_datasets(str(formats.write_labelme(tmp_path / "two", photos)))
    train, val = split_rows(records)
    assert len(train) == len(val) == 1
    records = datasets.load_datasets(str(formats.write_labelme(tmp_path / "one", photos[:1])))
    with pytest.raises(ValueError, match="has 1 images: a split needs two"):
        split_rows(records)
    with pytest.raises(ValueError, match="20 is no share"):
        split_rows(records, 20)


def test_the_command_writes_two_files(tmp_path, monkeypatch, capsys):
    photos = many(20)
    source = formats.write_ultralytics(
        tmp_path / "mine",
        [
            formats.Photo(p.name, 30, 30, [(formats.NAMES[0], b) for _, b in p.boxes])
            for p in photos
        ],
    )
    out = tmp_path / "deep/parts"
    assert main(["split", str(source), "--val", "0.25", "--out", str(out)]) == 0
    assert "YOLO txt: 20 images" in capsys.readouterr().out
    found = {}
    for part, count in (("train", 15), ("val", 5)):
        assert main(["check", f"{out}/{part}.json", "--images", "all"]) == 0
        records = datasets.load_datasets(f"{out}/{part}.json")
        assert abs(len(records) - count) <= 1
        found |= formats.found(records, formats.NAMES)
    whole = datasets.load_datasets(str(source))
    assert found == formats.found(whole, formats.NAMES)
    monkeypatch.chdir(tmp_path)
    assert main(["split", "mine"]) == 0 and (tmp_path / "mine_split/val.json").is_file()


@pytest.mark.parametrize("writer", ["voc", "roboflow"])
def test_parts_are_drawn_where_a_set_has_none(writer, tmp_path, rng, capsys):
    photos = formats.photos(rng, 10)
    path = formats.WRITERS[writer](tmp_path / "mine", photos)
    if writer == "roboflow":
        (tmp_path / "mine/train").rename(tmp_path / "all")
        path = tmp_path / "all/_annotations.coco.json"
    names, truths = {}, {}
    for part in ("train", "val"):
        name = f"{path}:{part}"
        records = datasets.load_datasets(name)
        names[part] = datasets.get_metadata(name).thing_classes
        truths |= formats.found(records, names[part])
        truth = ground_truth(name)
        assert {image["id"] for image in truth["images"]} == {r["image_id"] for r in records}
        assert [c["name"] for c in truth["categories"]] == list(formats.NAMES)
        assert len(truth["annotations"]) == len(records.boxes)
    assert truths == formats.truth(photos)
    assert names["train"] == names["val"] == list(formats.NAMES)
    assert main(["check", f"{path}:val"]) == 0
    assert "20% of the images drawn for val, by seed 0" in capsys.readouterr().out
    assert main(["check", f"{path}:test"]) == 1  # that isn't drawn


def test_captions_cannot_be_split(tmp_path, rng, capsys):
    file = miniatures.write_flickr30k(tmp_path, rng)
    assert main(["split", str(file), "--out", str(tmp_path / "out")]) == 1
    assert "only data sets with classes can be split" in capsys.readouterr().err
    assert not (tmp_path / "out/train.json").exists()


def test_fields_of_coco_that_a_split_keeps(tmp_path, rng):
    """Crowds stay crowds; ids of categories are those of the source."""
    photos = formats.photos(rng, 6)
    path = formats.write_roboflow(tmp_path / "mine", photos)
    file = path / "train/_annotations.coco.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    file.write_text(json.dumps(content))
    assert main(["split", str(path), "--out", str(tmp_path / "out")]) == 0
    train = json.loads((tmp_path / "out/train.json").read_text())
    assert all(a["iscrowd"] for a in train["annotations"])
    assert [c["id"] for c in train["categories"]] == [1, 2, 3]
