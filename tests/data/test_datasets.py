import copy
import json
import logging
import os
import pickle
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from dynamic_dino.data import datasets
from dynamic_dino.data.synthetic.drawn import NAMES, write_drawn_dataset
from helpers.seeds import fresh_rng

GOOD = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 60, "height": 40},
        {"id": 3, "file_name": "b.png", "width": 30, "height": 30},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 9, "bbox": [1, 2, 10, 20], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 4, "bbox": [5.5, 5, 54.5, 35]},
        {"id": 3, "image_id": 3, "category_id": 4, "bbox": [0, 0, 30, 30], "iscrowd": 1},
    ],
    "categories": [{"id": 9, "name": "red panda"}, {"id": 4, "name": " windmill "}],
}


def write(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_records_and_metadata(tmp_path):
    file = write(tmp_path / "mine.json", GOOD)
    datasets.register_coco_json("test_mine", file, tmp_path / "photos")
    records = DatasetCatalog.get("test_mine")
    metadata = MetadataCatalog.get("test_mine")
    assert metadata.thing_classes == ["windmill", "red panda"]  # in the order of the ids 4, 9
    assert (metadata.json_file, metadata.image_root) == (str(file), str(tmp_path / "photos"))
    assert [r["image_id"] for r in records] == [7, 3]
    assert records[0]["file_name"] == str(tmp_path / "photos" / "a.png")
    assert (records[0]["height"], records[0]["width"]) == (40, 60)
    boxes = [(a["bbox"], a["category_id"]) for a in records[0]["annotations"]]
    assert boxes == [([1, 2, 10, 20], 1), ([5.5, 5, 54.5, 35], 0)]
    assert all(a["bbox_mode"] == BoxMode.XYWH_ABS for a in records[0]["annotations"])
    assert [a["iscrowd"] for r in records for a in r["annotations"]] == [0, 0, 1]


def test_a_path_is_a_name(tmp_path):
    file = write(tmp_path / "mine.json", GOOD)
    assert datasets.get_metadata(str(file)).thing_classes == ["windmill", "red panda"]
    one, two = datasets.load_datasets([str(file), str(file)])
    assert list(one) == list(two) and one[0]["dataset_name"] == str(file)


def test_a_changed_file_is_read_anew(tmp_path):
    file = write(tmp_path / "mine.json", GOOD)
    datasets.register_coco_json("test_changed", file, tmp_path)
    assert datasets.get_metadata("test_changed").thing_classes[1] == "red panda"
    other = copy.deepcopy(GOOD)
    other["categories"][0]["name"] = "giant panda"
    write(file, other)
    datasets.register_coco_json("test_changed", file, tmp_path)
    assert datasets.get_metadata("test_changed").thing_classes[1] == "giant panda"


def test_optional_category_fields(tmp_path):
    content = copy.deepcopy(GOOD)
    content["categories"] = [
        {"id": 9, "name": "tomb", "frequency": "r", "novel": True, "near_synonyms": [4]},
        {"id": 4, "name": "grave", "frequency": "f", "near_synonyms": ["crypt", "not here"]},
        {"id": 12, "name": "crypt", "frequency": "c"},
    ]
    file = write(tmp_path / "mine.json", content)
    metadata = datasets.get_metadata(str(file))
    assert metadata.thing_classes == ["grave", "tomb", "crypt"]
    assert metadata.frequency == ["f", "r", "c"]
    assert metadata.novel == [False, True, False]
    assert metadata.near_synonyms == [[1, 2], [0], [0]]  # symmetric


def broken(path, value, content=GOOD):
    """A copy of the content with the field at `path` set to `value`, or removed for None."""
    content = copy.deepcopy(content)
    node = content
    for key in path[:-1]:
        node = node[key]
    if value is None:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return content


@pytest.mark.parametrize(
    "path, value, words",
    [
        (("categories", 0, "name"), None, ["categories[0]", "id 9", "no name"]),
        (("categories", 0, "name"), " . ", ["categories[0]", "id 9", "no name"]),
        (("categories", 1, "id"), 9, ["categories[1]", "twice"]),
        (("categories",), [], ["'categories' is empty"]),
        (("categories",), None, ["no list 'categories'"]),
        (("categories", 0, "frequency"), "often", ["'red panda'", "frequency", "'often'"]),
        (("categories", 0, "near_synonyms"), [77], ["'red panda'", "near_synonyms", "77"]),
        (("images", 0, "width"), None, ["images[0]", "'width'"]),
        (("images", 0, "height"), 0, ["images[0]", "60 x 0", "a.png"]),
        (("images", 0, "width"), "wide", ["images[0]", "wide x 40", "a.png"]),
        (("images", 1, "id"), 7, ["images[1]", "7 occurs twice"]),
        (("annotations", 1, "bbox"), None, ["annotations[1]", "id 2", "'bbox'"]),
        (("annotations", 1, "category_id"), 5, ["annotations[1]", "category_id 5", "categories"]),
        (("annotations", 1, "image_id"), 5, ["annotations[1]", "image_id 5", "images"]),
        (("annotations", 1, "id"), 1, ["annotations[1]", "id 1", "twice"]),
        (
            ("annotations", 1, "bbox"),
            [70, 5, 9, 9],
            ["id 2", "[70, 5, 9, 9]", "60 x 40"],
        ),
        (("annotations", 1, "bbox"), [-9, 5, 9, 9], ["id 2", "outside the image", "a.png"]),
        (("annotations", 1, "bbox"), [7, 5, 0, 9], ["id 2", "positive width and height"]),
        (("annotations", 1, "bbox"), [7, 5, 9, -1], ["id 2", "positive width and height"]),
        (  # [x1, y1, x2, y2]
            ("annotations", 1, "bbox"),
            [30, 20, 55, 40],
            ["id 2", "[30, 20, 55, 40]", "fits the image as [x1, y1, x2, y2]", "a.png"],
        ),
        (("annotations", 1, "bbox"), [7, 5, 9], ["id 2", "four finite numbers"]),
        (("annotations", 1, "bbox"), [7, 5, 9, float("inf")], ["id 2", "four finite numbers"]),
        (("annotations", 1, "bbox"), [7, 5, 9, "nan"], ["id 2", "four finite numbers"]),
    ],
)
def test_one_clear_error(tmp_path, path, value, words):
    file = write(tmp_path / "broken.json", broken(path, value))
    with pytest.raises(ValueError) as error:
        datasets.load_coco_json(file, tmp_path)
    for word in [str(file), *words]:
        assert word in str(error.value)


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        datasets.load_coco_json(tmp_path / "none.json", tmp_path)
    file = write(tmp_path / "cut.json", json.dumps(GOOD)[:-40])
    with pytest.raises(ValueError, match=r"cut\.json is not valid JSON.*truncated"):
        datasets.load_coco_json(file, tmp_path)


def test_missing_builtin_says_how_to_get_it(tmp_path):
    datasets.register_builtin(tmp_path)
    try:
        with pytest.raises(FileNotFoundError) as error:
            datasets.load_datasets("stamps_train")
        for word in ("stamps/annotations/train.json", "dynamic_dino.data.synthetic.stamps"):
            assert word in str(error.value)
        with pytest.raises(ValueError, match="unknown data set 'stamp_train'.*stamps_train"):
            datasets.load_datasets("stamp_train")
    finally:
        datasets.register_builtin()


def test_overhanging_boxes_are_clipped_and_counted(tmp_path, caplog):
    content = broken(("annotations", 0, "bbox"), [50, 30, 20, 10.5])
    content["annotations"][2]["bbox"] = [-0.5, 0, 30, 30]
    with caplog.at_level(logging.WARNING):
        records = datasets.load_coco_json(write(tmp_path / "a.json", content), tmp_path)
    assert records[0]["annotations"][0]["bbox"] == [50, 30, 10, 10]
    assert records[1]["annotations"][0]["bbox"] == [0, 0, 29.5, 30]
    assert "clipped 2 boxes" in caplog.text


def test_bad_boxes_can_be_dropped(tmp_path, caplog):
    content = broken(("annotations", 0, "bbox"), [50, 30, 20, 0])
    file = write(tmp_path / "a.json", content)
    with caplog.at_level(logging.WARNING):
        records = datasets.load_coco_json(file, tmp_path, bad_boxes="drop")
    assert len(records[0]["annotations"]) == 1
    assert "dropped 1" in caplog.text


CAPTION = "A red panda sits left of an old windmill; the panda sleeps."


def odvg(**region):
    regions = [
        {"bbox": [1, 2, 11, 22], "phrase": "red panda"},
        {"bbox": [20, 0, 60, 40], "phrase": "Old windmill"},
        {"bbox": [2, 2, 9, 9], "phrase": "red panda"},
        {
            "bbox": [3, 3, 9, 9],
            "phrase": "panda sleeps",
            "tokens_positive": [[46, 51], [52, 58]],
            **region,
        },
    ]
    grounding = {"caption": CAPTION, "regions": regions}
    return {"filename": "a.png", "height": 40, "width": 60, "grounding": grounding}


def test_grounding_records(tmp_path):
    file = write(tmp_path / "g.jsonl", json.dumps(odvg()) + "\n\n")
    (record,) = datasets.load_datasets(str(file))
    words = [[CAPTION[s:e] for s, e in spans] for spans in record["phrase_spans"]]
    assert words == [["red panda"], ["old windmill"], ["panda", "sleeps"]]
    assert [a["category_id"] for a in record["annotations"]] == [0, 1, 0, 2]
    assert record["annotations"][0]["bbox"] == [1, 2, 10, 20]
    assert record["file_name"] == str(tmp_path / "a.png")


@pytest.mark.parametrize(
    "region, words",
    [
        ({"tokens_positive": [[50, 99]]}, ["regions[3]", "(50, 99)", "outside the caption"]),
        ({"tokens_positive": None, "phrase": "ant"}, ["regions[3]", "'ant'", "does not occur"]),
        ({"tokens_positive": None, "phrase": " "}, ["regions[3]", "phrase is ' '"]),
        ({"bbox": [9, 9, 5, 20]}, ["regions[3]", "[9, 9, 5, 20]", "positive width"]),
        ({"bbox": [30, 20, 25, 15]}, ["regions[3]", "fits the image as [x, y, width, height]"]),
        ({"bbox": [5, 9, 5, 20]}, ["regions[3]", "positive width"]),
        ({"tokens_positive": [[9, 9]]}, ["regions[3]", "[[9, 9]]", "start < end"]),
        ({"bbox": [61, 9, 70, 20]}, ["regions[3]", "outside the image", "60 x 40"]),
        ({"bbox": None}, ["regions[3]", "'bbox'"]),
    ],
)
def test_grounding_errors(tmp_path, region, words):
    lines = [json.dumps(odvg()), json.dumps(odvg(**region))]
    file = write(tmp_path / "g.jsonl", "\n".join(lines))
    with pytest.raises(ValueError) as error:
        datasets.load_odvg_jsonl(file, tmp_path)
    for word in [f"{file}, line 2", *words]:
        assert word in str(error.value)


def test_truncated_grounding_file(tmp_path):
    file = write(tmp_path / "g.jsonl", json.dumps(odvg()) + "\n" + json.dumps(odvg())[:30])
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        datasets.load_odvg_jsonl(file, tmp_path)


MDETR = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": "60", "height": "40", "caption": CAPTION},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "bbox": [1, 2, 10, 20], "tokens_positive": [[2, 11]]},
        {"id": 2, "image_id": 7, "bbox": [20, 0, 40, 40], "tokens_positive": [[28, 40]]},
    ],
}


def test_mdetr_records(tmp_path):
    file = write(tmp_path / "m.json", MDETR)
    (record,) = datasets.load_datasets(str(file))
    assert [[CAPTION[s:e] for s, e in spans] for spans in record["phrase_spans"]] == [
        ["red panda"],
        ["old windmill"],
    ]
    assert (record["width"], record["height"], record["image_id"]) == (60, 40, 7)
    datasets.register_mdetr_json("test_whole", file, tmp_path, whole_caption=True)
    (record,) = datasets.load_datasets("test_whole")
    assert record["phrase_spans"] == [[[0, len(CAPTION)]]]
    assert [a["category_id"] for a in record["annotations"]] == [0, 0]
    assert MetadataCatalog.get("test_whole").evaluator_type == "refexp"


def test_mdetr_is_recognised_wherever_its_images_stand(tmp_path):
    content = {key: MDETR[key] for key in reversed(MDETR)} | {"info": {"caption": "no"}}
    (record,) = datasets.load_datasets(str(write(tmp_path / "m.json", content)))
    assert record["caption"] == CAPTION
    coco = {"info": [{"caption": "no"}], **GOOD}
    assert "caption" not in datasets.load_datasets(str(write(tmp_path / "c.json", coco)))[0]


@pytest.mark.parametrize(
    "path, value, words",
    [
        (("images", 0, "caption"), None, ["images[0]", "'caption'"]),
        (("images", 0, "caption"), 5, ["images[0]", "caption 5 is no text"]),
        (("annotations", 1, "tokens_positive"), [[28, 99]], ["annotations[1]", "(28, 99)", "id 2"]),
        (("annotations", 1, "tokens_positive"), [[5, 4]], ["annotations[1]", "start < end"]),
        (("annotations", 1, "tokens_positive"), None, ["annotations[1]", "'tokens_positive'"]),
        (("annotations", 1, "bbox"), [9, 9, 0, 4], ["annotations[1]", "positive width", "a.png"]),
        (("annotations", 1, "bbox"), [-9, 9, 4, 4], ["annotations[1]", "outside the image"]),
        (("annotations", 1, "image_id"), 8, ["annotations[1]", "image_id 8"]),
        (("annotations", 1, "id"), 1, ["annotations[1]", "twice"]),
        (("annotations",), None, ["no list 'annotations'"]),
    ],
)
def test_mdetr_errors(tmp_path, path, value, words):
    file = write(tmp_path / "m.json", broken(path, value, MDETR))
    with pytest.raises(ValueError) as error:
        datasets.load_mdetr_json(file, tmp_path)
    for word in [str(file), *words]:
        assert word in str(error.value)


def test_bad_phrases_of_published_files_are_dropped_and_counted(tmp_path, caplog):
    file = write(
        tmp_path / "m.json", broken(("annotations", 1, "tokens_positive"), [[28, 99]], MDETR)
    )
    with caplog.at_level(logging.WARNING):
        (record,) = datasets.load_mdetr_json(file, tmp_path, bad_boxes="drop")
    assert len(record["annotations"]) == len(record["phrase_spans"]) == 1
    assert "dropped 1 boxes (phrase outside the caption: 1)" in caplog.text


def test_annotations_may_come_before_their_images(tmp_path):
    file = write(tmp_path / "a.json", {key: GOOD[key] for key in reversed(GOOD)})
    other = write(tmp_path / "b.json", GOOD)
    for a, b in zip(*datasets.load_datasets([str(file), str(other)]), strict=True):
        assert {**a, "dataset_name": 0} == {**b, "dataset_name": 0}


def test_names_are_kept_once_and_not_in_records(tmp_path):
    """V3Det has 13,204."""
    content = copy.deepcopy(GOOD)
    content["categories"] += [{"id": i, "name": f"thing number {i}"} for i in range(20, 13_222)]
    content["annotations"][0]["category_id"] = 13_221
    name = str(write(tmp_path / "many.json", content))
    records = datasets.load_datasets(name)
    assert len(datasets.get_metadata(name).thing_classes) == 13_204
    assert records[0]["annotations"][0]["category_id"] == 13_203
    assert len(pickle.dumps(records)) < 2000 and b"thing" not in pickle.dumps(records)


def test_drawn_is_deterministic_and_its_boxes_fit(tmp_path):
    seed = int(fresh_rng().integers(1000))
    a = write_drawn_dataset(tmp_path / "a", 6, 96, seed)
    b = write_drawn_dataset(tmp_path / "b", 6, 96, seed)
    c = write_drawn_dataset(tmp_path / "c", 6, 96, seed + 1)
    assert a.read_text() == b.read_text() != c.read_text()
    images = sorted((tmp_path / "a").rglob("*.png"))
    assert len(images) == 6
    for image in images:
        assert (
            image.read_bytes() == (tmp_path / "b" / image.relative_to(tmp_path / "a")).read_bytes()
        )
    records = datasets.load_coco_json(a, tmp_path / "a/drawn/train")
    assert datasets.get_metadata(str(a)).thing_classes == list(NAMES)
    assert all(record["annotations"] for record in records)


def test_standard_coco_layout():
    """On real files, where a folder with COCO's layout is at hand."""
    root = Path(os.environ.get("MINIATURE_DATASETS", "/nonexistent"))
    if not (root / "coco/annotations/instances_train2017.json").is_file():
        pytest.skip("MINIATURE_DATASETS has no coco/annotations/instances_train2017.json")
    datasets.register_builtin(root)
    try:
        records = datasets.load_datasets("coco_2017_train")
        assert len(datasets.get_metadata("coco_2017_train").thing_classes) == 80
        assert all(Path(record["file_name"]).is_file() for record in records)
    finally:
        datasets.register_builtin()
