"""Labels mean what their file says: training, `check` and scoring read the same, or all refuse."""

import copy
import json
import math

import pytest
from dynamic_dino.data import check, datasets
from dynamic_dino.data.check import check_dataset
from dynamic_dino.data.json_stream import stream_json
from dynamic_dino.data.problems import MAX_LENGTH, DataError
from dynamic_dino.evaluation.coco import coco_ap, read_ground_truth
from dynamic_dino.evaluation.predictions import DatasetPredictions
from helpers.seeds import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NAMES = ["红熊猫", "traffic light", "Mühle"]
MODEST = settings(
    max_examples=examples(15),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def plain() -> dict:
    boxes = [(1, 1, [2.0, 3.0, 10.5, 8.0]), (1, 2, [12, 1, 5, 6]), (2, 3, [0, 0, 60, 40])]
    boxes += [(3, 1, [1.25, 2, 3, 4]), (3, 2, [30, 20, 10, 10])]
    return {
        "images": [
            {"id": i, "file_name": f"é {i}.jpg", "width": 60, "height": 40, "license": 1}
            for i in (1, 2, 3)
        ],
        "annotations": [
            {"id": k, "image_id": i, "category_id": c, "bbox": box, "iscrowd": int(k == 4)}
            | {"area": 30.0}
            for k, (i, c, box) in enumerate(boxes)
        ],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)],
    }


def trained(path) -> list:
    records = datasets.load_datasets(str(path))
    names = datasets.get_metadata(str(path)).thing_classes
    return [
        (
            record["file_name"].rsplit("/", 1)[1],
            record["width"],
            [(names[a["category_id"]], a["bbox"], a["iscrowd"]) for a in record["annotations"]],
        )
        for record in records
    ]


def scored(path) -> tuple[list, dict]:
    """What the ground truth has, without ids; and the scores of half of its boxes."""
    truth = read_ground_truth(path)
    files = {image["id"]: image["file_name"] for image in truth["images"]}
    names = {category["id"]: category["name"] for category in truth["categories"]}
    boxes = [
        (files[a["image_id"]], names[a["category_id"]], a["bbox"], a["iscrowd"], a["area"])
        for a in truth["annotations"]
    ]
    found = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.5 + i / 10}
        for i, a in enumerate(truth["annotations"][::2])
    ]
    file = path.with_name("predictions.json")
    DatasetPredictions.read(found).write(file)
    return boxes, coco_ap(path, file).metrics


WAYS_OF_IDS = [int, float, str, lambda i: i + (1 << 127), lambda i: f"ü{i}", lambda i: -i]
FLAGS = [
    [0, False, "0", "false", 0.0, None, "no", "0.0", " False "],
    [1, True, "1", "true", 1.0, "TRUE", "1.0"],
]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"]
UNREAD = [math.nan, math.inf, -math.inf, 10**40, None, [], {"a": [math.nan]}, "\ud800", True]


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    file = tmp_path_factory.mktemp("plain") / "plain.json"
    file.write_text(json.dumps(plain()))
    return trained(file), scored(file)


@MODEST
@given(st.data())
def test_what_can_mean_one_thing_is_read_as_that(wanted, tmp_path, data):
    content = plain()
    image_id, category_id, own_id = (data.draw(st.sampled_from(WAYS_OF_IDS)) for _ in range(3))
    as_text = data.draw(st.booleans())
    for image in content["images"]:
        image["id"] = image_id(image["id"])
        image["width"] = data.draw(st.sampled_from([60, "60", 60.0, "60.0", " 60"]))
        image["license"] = data.draw(st.sampled_from(UNREAD))
    for annotation in content["annotations"]:
        annotation["image_id"] = image_id(annotation["image_id"])
        annotation["category_id"] = category_id(annotation["category_id"])
        annotation["id"] = own_id(annotation["id"] + 1)
        annotation["iscrowd"] = data.draw(st.sampled_from(FLAGS[annotation["iscrowd"]]))
        if as_text:
            annotation["bbox"] = [str(v) for v in annotation["bbox"]]
        for field in ("score", "keypoints", "attributes"):
            annotation[field] = data.draw(st.sampled_from(UNREAD))
    for category in content["categories"]:
        category["id"] = category_id(category["id"])
        category["supercategory"] = data.draw(st.sampled_from(UNREAD))
    order = data.draw(st.permutations(list(content)))
    text = json.dumps({key: content[key] for key in order}, ensure_ascii=data.draw(st.booleans()))
    other = tmp_path / "other.json"
    encoding = data.draw(st.sampled_from(ENCODINGS))
    other.write_bytes(text.encode(encoding, errors="backslashreplace"))
    result = check_dataset(str(other), images=0)
    assert result.ok, "\n".join(result.lines())
    assert (trained(other), scored(other)) == wanted


values = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, 2, -1, 1 << 70, 10**400, 1.5, math.nan, math.inf, 1e300, 60])
    | st.sampled_from(
        ["", " ", "1", "a", "a" * 10**5, "0", "???", "_", "nan", "\ud800", "\0", "1_0"]
    ),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(["id", "name", "counts", "size"]), inner, max_size=2)
    ),
    max_leaves=8,
)
FIELDS = [
    *(("images", field) for field in ("id", "file_name", "width", "height", "neg_category_ids")),
    *(
        ("annotations", field)
        for field in ("id", "image_id", "category_id", "bbox", "iscrowd", "ignore", "area")
    ),
    ("annotations", "segmentation"),
    *(("categories", field) for field in ("id", "name", "frequency", "novel", "near_synonyms")),
    *((section, None) for section in ("images", "annotations", "categories")),
]


@settings(MODEST, max_examples=examples(120))
@given(st.sampled_from(FIELDS), values, st.booleans())
def test_nothing_is_good_here_and_a_crash_there(tmp_path, field, value, outline):
    section, key = field
    content = plain()
    if outline:
        del content["annotations"][1]["bbox"]
        content["annotations"][1]["segmentation"] = [[12, 1, 17, 1, 17, 7, 12, 7]]
    if key is None:
        content[section][1] = value
    else:
        content[section][1][key] = value
    file = tmp_path / "odd.json"
    file.write_text(json.dumps(content))
    result = check_dataset(str(file), images=0)

    def works(read) -> bool:
        try:
            read(file)
        except ValueError as error:
            assert str(file) in str(error) and len(str(error)) < 2 * MAX_LENGTH
            return False
        return True

    assert works(trained) == (result.ok or {*result.counts} - result.notes == {"only crowds"})
    if result.ok:
        assert works(scored)


def grounded() -> dict[str, dict]:
    """Format -> lines of ODVG, or the content of an MDETR file."""
    line = {"filename": "a.jpg", "width": 60, "height": 40}
    caption, spans = "a cat and a dog", [[2, 5]]
    region = {"bbox": [1, 2, 9, 8], "phrase": "cat", "tokens_positive": spans}
    mdetr = plain()
    for image in mdetr["images"]:
        image["caption"] = caption
    for annotation in mdetr["annotations"]:
        annotation["tokens_positive"] = spans
    return {
        "detection": line
        | {"detection": {"instances": [{"bbox": [1, 2, 9, 8], "category": "cat"}]}},
        "grounding": line | {"grounding": {"caption": caption, "regions": [region]}},
        "mdetr": mdetr,
    }


GROUNDED = [
    *(("detection", path) for path in ("filename", "width", "detection", "detection/instances")),
    *(("detection", f"detection/instances/0{path}") for path in ("", "/bbox", "/category")),
    *(("grounding", path) for path in ("grounding", "grounding/caption", "grounding/regions")),
    *(
        ("grounding", f"grounding/regions/0{path}")
        for path in ("", "/bbox", "/phrase", "/tokens_positive")
    ),
    *(("mdetr", f"images/1/{path}") for path in ("caption", "file_name", "height", "id")),
    *(("mdetr", f"annotations/1/{path}") for path in ("tokens_positive", "bbox", "iscrowd")),
]


@settings(MODEST, max_examples=examples(80))
@given(st.sampled_from(GROUNDED), values)
def test_captions_are_refused_or_read_by_all(tmp_path, place, value):
    kind, path = place
    content = grounded()[kind]
    *parents, last = path.split("/")
    node = content
    for key in parents:
        node = node[int(key) if key.isdecimal() else key]
    node[int(last) if last.isdecimal() else last] = value
    file = tmp_path / ("a.json" if kind == "mdetr" else "a.jsonl")
    file.write_text(json.dumps(content))
    load = datasets.load_mdetr_json if kind == "mdetr" else datasets.load_odvg_jsonl
    try:
        records = list(load(file, tmp_path))
    except ValueError as error:
        assert str(file) in str(error)
        records = None
    if kind == "mdetr" and path.endswith("caption"):
        return  # by which the format is told from COCO's
    result = check_dataset(str(file), images=0)
    assert result.ok == (records is not None), result.counts


def test_spans_are_whole_numbers(tmp_path):
    content, file = grounded()["grounding"], tmp_path / "a.jsonl"
    region = content["grounding"]["regions"][0]

    def spans(value) -> list:
        region["tokens_positive"] = value
        file.write_text(json.dumps(content))
        return datasets.load_odvg_jsonl(file, tmp_path)[0]["phrase_spans"]

    for value in ([["2", "5"]], [[2.0, 5]]):
        assert spans(value) == [[[2, 5]]]
    for value in (["25"], [[1.5, 3]], [[False, 3]], [[0, math.inf]], "ab", {"25": 1}, [[2, 5, 7]]):
        with pytest.raises(ValueError, match=r"a\.jsonl, line 1: grounding.*are no spans: give"):
            spans(value)


def test_a_check_that_fails_itself_hides_no_other(tmp_path, monkeypatch):
    def broken(*arguments):
        yield DataError("unclean name", "of the first check")
        raise TypeError("of the\nsecond")

    content = plain()
    content["annotations"].append({**content["annotations"][0], "id": 99})
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content))
    monkeypatch.setattr(check, "check_names", broken)
    result = check_dataset(str(file), images=0)
    assert result.counts == {"unclean name": 1, "failed check": 1, "box twice": 1} and not result.ok
    assert any("TypeError (of the second; test_one_reader.py" in line for line in result.lines())


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "gbk", "shift-jis"])
def test_other_encodings_are_named(tmp_path, encoding):
    content = plain()
    word = "é" if encoding in ("latin-1", "cp1252") else "魚"
    content["images"][0]["file_name"] = f"{word}.jpg"
    content["categories"] = [{"id": i, "name": f"{word} {i}"} for i in (1, 2, 3)]
    for image in content["images"]:
        image["file_name"] = f"{word}{image['id']}.jpg"
    file = tmp_path / "a.json"
    file.write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    for read in (trained, scored):
        with pytest.raises(ValueError, match="not text in UTF-8.*save it as UTF-8") as error:
            read(file)
        assert "truncated" not in str(error.value)
    assert "not text in UTF-8" in "\n".join(check_dataset(str(file)).lines())


def test_wrong_and_truncated_json_are_told_apart(tmp_path):
    text = json.dumps(plain(), ensure_ascii=False, indent=1)
    file = tmp_path / "a.json"

    def problem(written: str) -> str:
        file.write_text(written, encoding="utf-8")
        with pytest.raises(ValueError, match="is not valid JSON") as error:
            list(stream_json(file, list(plain())))
        return str(error.value)

    for cut in range(0, len(text) - 1, 37):
        assert "may be truncated" in problem(text[:cut])
    for old, new in (('"id": 2,', '"id": 2'), ("[", "[,"), ("60", "sixty"), ("}\n ]", "},\n ]")):
        wrong = problem(text.replace(old, new, 1))
        assert "may be truncated" not in wrong and "line " in wrong and "correct it there" in wrong
    assert "Extra data" in problem(text + "{}")
    assert "nested too deeply" in problem("[" * 200_000)


def lines(path) -> str:
    return "\n".join(check_dataset(str(path), images=0).lines())


def test_boxes_from_outlines(tmp_path):
    content = plain()
    kept = copy.deepcopy(content)
    for a in content["annotations"]:
        x, y, w, h = a.pop("bbox")
        a["segmentation"] = [[x, y, x + w, y, x + w, y + h], [x, y, x, y + h, x + w, y + h]]
    # 60 columns of 40 rows; the box of annotation 1
    x, y, w, h = kept["annotations"][1]["bbox"]
    counts = [40 * x + y] + [h, 40 - h] * w
    counts[-1] = 60 * 40 - sum(counts[:-1])
    content["annotations"][1]["segmentation"] = {"counts": counts, "size": [40, 60]}
    paths = tmp_path / "plain.json", tmp_path / "outlines.json"
    for path, written in zip(paths, (kept, content), strict=True):
        path.write_text(json.dumps(written))
    assert trained(paths[0]) == trained(paths[1])
    assert scored(paths[0])[0] == scored(paths[1])[0]
    assert "5 boxes have no 'bbox' and were made from their polygons" in lines(paths[1])


def test_what_check_says_of_labels_that_are_right_but_odd(tmp_path):
    file = tmp_path / "a.json"
    content = plain()
    content["images"].append({**content["images"][0], "id": 9, "file_name": "./é 1.jpg"})
    content["annotations"] += [{**content["annotations"][0], "id": 50}]
    content["categories"].append({"id": 9, "name": "animals"})
    file.write_text(json.dumps(content))
    result = check_dataset(str(file), images=0)
    kinds = ("image under two ids", "box twice", "name without a box")
    assert result.ok and all(result.counts[kind] == 1 for kind in kinds)
    assert "1 names have no box and aren't asked for ('animals')" in result.recognised
    content = plain()
    for annotation in content["annotations"]:
        annotation["iscrowd"] = "1"
    file.write_text(json.dumps(content))
    assert "all 5 boxes are crowds" in lines(file) and "NOT good" in lines(file)
    content["categories"][0]["id"] = content["annotations"][0]["category_id"] = "1"
    file.write_text(json.dumps(content))
    assert "ids of categories are numbers (2) and text ('1')" in lines(file)
    assert "category_id 1 is not among the file's categories, where '1' is" in lines(file)


def test_boxes_of_tracks_reach_beyond_the_image(tmp_path):
    content = plain()
    content["annotations"][0]["bbox"] = [20, 10, 50, 20]  # fits as corners too
    content["annotations"][1]["bbox"] = [40, 5, 30, 20]  # doesn't
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content))
    assert "box beyond the image: 1" in lines(file) and "far beyond the image, to (70" in lines(
        file
    )
    content["annotations"][1]["bbox"] = [40, 5, 10, 20]
    file.write_text(json.dumps(content))
    assert "mixed box conventions: 1" in lines(file)


def test_label_studio_tasks_where_coco_is_expected(tmp_path):
    file = tmp_path / "a.json"
    task = {"id": 1, "data": {"image": "a.jpg"}, "annotations": [{"result": []}]}
    file.write_text(json.dumps([task]))
    for read in (read_ground_truth, lambda path: datasets.load_coco_json(path, tmp_path)):
        with pytest.raises(ValueError, match="Label Studio's own JSON.*export the project as COCO"):
            read(file)
    capitals = tmp_path / "TRAIN.JSON"
    capitals.write_text(json.dumps(plain()))
    assert len(trained(capitals)) == 3
