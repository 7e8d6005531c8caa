"""python -m dynamic_dino.data: list, check, show, convert."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from dynamic_dino.data import datasets
from dynamic_dino.data.__main__ import main
from dynamic_dino.data.builtin import BUILTIN, Builtin
from dynamic_dino.data.check import check_dataset
from dynamic_dino.data.convert import convert_dataset
from dynamic_dino.data.show import phrases_of
from dynamic_dino.data.synthetic.drawn import NAMES
from helpers import miniatures
from PIL import Image


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def found(result) -> Counter:
    """Few pictures don't show all names."""
    return Counter({k: n for k, n in result.counts.items() if k != "name without a box"})


def test_a_good_file_is_good(root, rng, capsys):
    file = miniatures.write_coco(root, rng)
    assert main(["check", str(file), "--image-folder", str(root / "coco/train2017")]) == 0
    report = capsys.readouterr().out
    assert "4 images" in report and "12 names" in report and "  good" in report


def test_counts_are_compared_with_the_published_ones(root, rng, capsys):
    miniatures.write_objects365(root, rng)
    miniatures.write_odinw(root, rng)
    assert main(["check", "odinw_CottontailRabbits_val"]) == 0  # no count is known
    assert main(["check", "odinw_CottontailRabbits_val", "objects365_v1_train"]) == 1
    report = capsys.readouterr().out
    assert "wrong count: 2" in report
    assert "4 images, but about 609,000 are published" in report and "objects365.org" in report


@pytest.mark.parametrize("images, ok", [(609_400, True), (608_606, True), (607_900, False)])
def test_published_counts_are_rounded(monkeypatch, root, rng, images, ok):
    miniatures.write_objects365(root, rng, count=1)
    boxes = len(datasets.load_file(datasets.locate_dataset("objects365_v1_train")).boxes)
    file = BUILTIN["objects365_v1_train"].files
    entry = Builtin("two", "coco", file, "https://x", "y", 609_000 - images + 1, boxes, 1000)
    monkeypatch.setitem(BUILTIN, "two", entry)
    assert check_dataset("two").ok == ok


@pytest.mark.parametrize("kind", ["write_objects365", "write_flickr30k"])
def test_texts_are_compared_with_the_published_ones_and_are_no_reason_to_refuse(
    monkeypatch, root, rng, kind
):
    """Column Texts of Table 7: names of classes, or different phrases of captions."""
    getattr(miniatures, kind)(root, rng)
    name = {"write_objects365": "objects365_v1_train"}.get(kind, "flickr30k_train")
    published = BUILTIN[name]
    assert published.texts == {"objects365_v1_train": 365, "flickr30k_train": 94_000}[name]
    records = datasets.load_file(datasets.locate_dataset(name))
    texts = set(datasets.get_metadata(name).thing_classes) or {
        " ".join(r["caption"][a:b] for a, b in spans).lower()
        for r in records for spans in r["phrase_spans"]
    }  # fmt: skip
    counts = dict(images=None, boxes=None, options=published.options)
    for number, notes in ((len(texts), 0), (len(texts) + 1, 1), (365_000, 1)):
        entry = Builtin(name, published.format, published.files, "https://x", "y", texts=number,
                        **counts)  # fmt: skip
        monkeypatch.setitem(BUILTIN, name, entry)
        result = check_dataset(name)
        assert result.counts["other number of texts"] == notes and result.ok


def test_a_missing_file_says_where_to_get_it(root, capsys):
    assert main(["check", "lvis_v1_val", "refcoco_testA"]) == 1
    report = capsys.readouterr().out
    assert "lvis/lvis_v1_val.json does not exist" in report and "lvisdataset.org" in report
    assert "finetune_refcoco_testA.json does not exist" in report  # the second is checked as well
    assert main(["check", "no_such_name"]) == 1
    assert "unknown data set 'no_such_name'" in capsys.readouterr().err


def test_everything_wrong_with_a_coco_file_is_found_at_once(root, rng):
    file = miniatures.write_coco(root, rng, count=6)
    folder = root / "coco/train2017"

    def spoil(content):
        first, second, third = (dict(content["annotations"][0], id=900 + i) for i in range(3))
        image = content["images"][0]
        w, h = image["width"], image["height"]
        content["annotations"] += [
            {**first, "bbox": [1, 1, 0, 5]},
            {**second, "bbox": [w + 1, 1, 5, 5]},
            {**third, "bbox": [w // 2, h // 2, w - 1, h - 1]},  # [x1, y1, x2, y2]
            {**third, "bbox": [1, 1, 5, 5]},  # its id occurs twice
            {**third, "id": 903, "bbox": [1, 2, 3]},
            {**third, "id": 904, "bbox": [1, 1, 5, -1]},
            {**third, "id": 905, "category_id": 999},
            {**third, "id": 906, "image_id": 12345678},
            {"id": 907, "image_id": image["id"], "category_id": 3},
        ]
        content["categories"][0]["name"] = "red_circle (drawn)"
        content["categories"][1]["name"] = content["categories"][2]["name"].upper()
        content["images"].append({**content["images"][1], "file_name": "again.jpg"})

    edit(file, spoil)
    names = [image["file_name"] for image in json.loads(file.read_text())["images"]]
    (folder / names[2]).unlink()
    (folder / names[3]).write_bytes(b"no picture")
    Image.new("RGB", (7, 9)).save(folder / names[4])
    result = check_dataset(str(file), folder, images=None)
    assert found(result) == Counter(
        {
            "empty box": 2,
            "box outside the image": 1,
            "mixed box conventions": 1,
            "malformed box": 1,
            "duplicate id": 2,
            "unknown category": 1,
            "unknown image": 1,
            "missing field": 1,
            "missing image": 1,
            "bad image": 2,
            "unclean name": 1,
            "duplicate name": 1,
        }
    )
    assert not result.ok
    report = "\n".join(result.lines())
    for word in ("(id 901)", "[x, y, width, height]", "correct or remove"):
        assert word in report
    # training refuses the first of them
    with pytest.raises(ValueError, match=str(file)):
        datasets.load_file(datasets.locate_dataset(str(file), folder))


def test_relative_boxes_are_noticed(root, rng):
    file = miniatures.write_coco(root, rng)

    def divide(content):
        for annotation in content["annotations"]:
            annotation["bbox"] = [v / 100 for v in annotation["bbox"]]

    edit(file, divide)
    result = check_dataset(str(file), root / "coco/train2017")
    assert found(result) == Counter({"boxes not in pixels": 1})


def test_a_truncated_file_is_one_finding(root, rng):
    file = miniatures.write_gqa(root, rng)
    text = file.read_text()
    file.write_text(text[: int(rng.integers(10, len(text) - 2))])
    result = check_dataset("gqa_train")
    assert result.counts == Counter({"unreadable file": 1})
    assert "truncated" in "\n".join(result.lines())


def test_published_files_may_have_a_few_impossible_boxes(root, rng):
    file = miniatures.write_odinw(root, rng)
    edit(file, lambda content: content["annotations"][0].update(bbox=[1, 1, 0, 0]))
    result = check_dataset("odinw_CottontailRabbits_val")
    assert result.counts == Counter({"empty box": 1}) and result.ok
    assert not check_dataset(str(file)).ok  # as one's own file it is refused


@pytest.mark.parametrize("format", ["mdetr", "odvg"])
def test_grounding_problems(root, rng, format):
    file = miniatures.write_flickr30k(root, rng)

    def spoil(content):
        content["annotations"][0]["tokens_positive"] = [[5, 5000]]
        content["annotations"][1]["tokens_positive"] = [[9, 9]]
        content["annotations"][2]["bbox"] = [1, 1, -4, 4]
        long = " and a red circle" * 100
        for image in content["images"][-1:]:
            image["caption"] += long

    folder = root / "flickr30k/flickr30k_images"
    if format == "odvg":
        odvg = root / "a.jsonl"
        convert_dataset("flickr30k_train", odvg, "odvg")
        lines = [json.loads(line) for line in odvg.read_text().splitlines()]
        regions = [region for line in lines for region in line["grounding"]["regions"]]
        regions[0]["tokens_positive"] = [[5, 5000]]
        del regions[1]["tokens_positive"]
        regions[1]["phrase"] = "submarine"
        regions[2]["bbox"] = [9, 1, 4, 4]
        lines[-1]["grounding"]["caption"] += " and a red circle" * 100
        odvg.write_text("\n".join(map(json.dumps, lines)))
        file = odvg
    else:
        edit(file, spoil)
    result = check_dataset(str(file), folder)
    box = "mixed box conventions" if format == "odvg" else "empty box"
    assert result.counts == Counter(
        {"phrase outside the caption": 2, box: 1, "caption over the token limit": 1}
    )
    report = "\n".join(result.lines())
    assert "tokens, at most 256 fit" in report and "5000" in report
    assert check_dataset(str(file), folder, max_tokens=1000).counts.total() == 3


def test_a_contact_sheet(root, rng, capsys):
    miniatures.write_refcoco(root, rng)
    outs = [root / f"{name}.png" for name in ("one", "two", "three")]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        assert (
            main(["show", "refcoco_val", "--out", str(out), "--count", "2", "--seed", f"{seed}"])
            == 0
        )
    sheets = [np.asarray(Image.open(out)) for out in outs]
    assert sheets[0].shape[1:] == (1600, 3) and np.array_equal(sheets[0], sheets[1])
    record = datasets.load_file(datasets.locate_dataset("refcoco_val"))[0]
    assert phrases_of(record, []) == [record["caption"]]
    record["annotations"][0]["iscrowd"] = 1
    assert phrases_of(record, []) == [f"{record['caption']} (crowd)"]
    (root / "coco/train2014" / Path(record["file_name"]).name).unlink()
    assert main(["show", "refcoco_val", "--out", str(outs[0]), "--count", "99"]) == 1
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("write, format", [("write_coco", "coco"), ("write_flickr30k", "mdetr")])
def test_round_trips(root, rng, write, format, capsys):
    source = getattr(miniatures, write)(root, rng)
    folder = root / "images"
    line, back = root / "a.jsonl", root / "b.json"

    def fractions(content):
        for annotation in content["annotations"]:
            annotation["bbox"] = [round(v * 0.9 + 0.37, 2) for v in annotation["bbox"]]

    edit(source, fractions)
    assert main(["convert", str(source), str(line), "--to", "odvg"]) == 0
    assert main(["convert", str(line), str(back), "--to", format]) == 0
    a, b, c = (
        datasets.load_file(datasets.locate_dataset(str(file), folder))
        for file in (source, line, back)
    )
    names = [datasets.get_metadata(str(file)).thing_classes for file in (source, line, back)]
    assert names[1] == names[2] and set(names[1]) <= set(names[0])
    for records, classes in ((b, names[1]), (c, names[2])):
        for x, y in zip(a, records, strict=True):
            assert phrases_of(x, names[0]) == phrases_of(y, classes)
            np.testing.assert_allclose(
                [k["bbox"] for k in x["annotations"]],
                [k["bbox"] for k in y["annotations"]],
                atol=1e-3,
            )
            assert {k: x[k] for k in ("file_name", "height", "width")} == {
                k: y[k] for k in ("file_name", "height", "width")
            }
    # the numbers of the file, without float32's tail
    boxes = [annotation["bbox"] for annotation in json.loads(source.read_text())["annotations"]]
    again = [annotation["bbox"] for annotation in json.loads(back.read_text())["annotations"]]
    np.testing.assert_allclose(boxes, again, atol=1e-9)


def test_what_the_target_cannot_hold_is_said(root, rng, capsys):
    coco, gqa = miniatures.write_coco(root, rng), miniatures.write_gqa(root, rng)
    out = root / "out.json"
    assert main(["convert", str(coco), str(out), "--to", "mdetr"]) == 1
    assert main(["convert", str(gqa), str(out), "--to", "coco"]) == 1
    errors = capsys.readouterr().err
    assert "MDETR JSON has only captions" in errors and "COCO JSON has only classes" in errors
    assert not out.exists()
    edit(coco, lambda content: content["annotations"][0].update(iscrowd=1))
    assert main(["convert", str(coco), str(root / "a.jsonl"), "--to", "odvg"]) == 0
    assert "left out 1 boxes of crowds" in capsys.readouterr().out


def test_classes_without_a_box_survive_odvg(root, rng):
    """By label_map.json, which Open-GroundingDino needs, in their order."""
    coco, line, again = miniatures.write_coco(root, rng), root / "x" / "a.jsonl", root / "b.json"
    extra = [{"id": 0, "name": "no box 鲈"}, {"id": 1000, "name": "none either"}]
    edit(coco, lambda content: content["categories"].extend(extra))
    convert_dataset(str(coco), line, "odvg")
    names = datasets.get_metadata(str(coco)).thing_classes
    label_map = json.loads((line.parent / "label_map.json").read_text(encoding="utf-8"))
    assert {"no box 鲈", "none either"} < set(names)
    assert label_map == {str(i): name for i, name in enumerate(names)}
    convert_dataset(str(line), again, "coco")
    assert [c["name"] for c in json.loads(again.read_text(encoding="utf-8"))["categories"]] == names
    edit(coco, lambda c: c.update(categories=c["categories"][:-1]))
    convert_dataset(str(coco), line, "odvg")
    with pytest.raises(ValueError, match="label_map.json has other classes, .* a.jsonl: write b"):
        convert_dataset(str(again), line.with_name("b.jsonl"), "odvg")
    (line.parent / "label_map.json").write_text('{"0": 7}')
    with pytest.raises(ValueError, match="label_map.json is no label map"):
        datasets.load_datasets(str(line))


def test_an_interrupted_conversion_leaves_the_old_file(root, rng, monkeypatch):
    file, out = miniatures.write_coco(root, rng), root / "a.jsonl"
    out.write_text("old")
    monkeypatch.setattr("dynamic_dino.data.convert._odvg_line", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert_dataset(str(file), out, "odvg")
    assert out.read_text() == "old" and not list(root.glob("*.partial"))


def test_list_says_what_is_there(root, rng, capsys):
    miniatures.write_v3det(root, rng)
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    state = {line[9:].split()[0]: line[:9].strip() for line in lines[1:]}
    assert state["v3det_train"] == "found" and state["gqa_train"] == "not found"
    assert not any(name.startswith("odinw_") for name in state)
    main(["list", "--all"])
    assert "odinw_Raccoon_val" in capsys.readouterr().out


def test_detection_lines_of_odvg(root, rng):
    """Also a box list per region and lines of both kinds in one file, as mmdetection allows."""
    file = root / "a.jsonl"
    size = {"filename": "a.jpg", "height": 40, "width": 60}
    instances = [
        {"bbox": [1, 2, 11, 22], "label": 7, "category": NAMES[3]},
        {"bbox": [3, 3, 9, 9], "label": 2, "category": NAMES[1]},
        {"bbox": [4, 4, 9, 9], "label": 7, "category": NAMES[3]},
    ]
    region = {"bbox": [[1, 1, 5, 5], [6, 6, 9, 9]], "phrase": "two cats"}
    lines = [
        {**size, "detection": {"instances": instances}},
        {**size, "grounding": {"caption": "Two cats asleep", "regions": [region]}},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    detection, grounding = datasets.load_datasets(str(file))
    assert datasets.get_metadata(str(file)).thing_classes == [NAMES[3], NAMES[1]]
    assert [a["category_id"] for a in detection["annotations"]] == [0, 1, 0]
    assert "caption" not in detection
    assert grounding["phrase_spans"] == [[[0, 8]]]
    assert [a["bbox"] for a in grounding["annotations"]] == [[1, 1, 4, 4], [6, 6, 3, 3]]
    del lines[0]["detection"]["instances"][1]["category"]
    file.write_text(json.dumps(lines[0]))
    with pytest.raises(ValueError, match=r"line 1: detection\.instances\[1\].*'category'"):
        datasets.load_datasets(str(file))
