"""Held-out names with and without a near-synonym, and chance, on cases whose AP is known."""

import json

import pytest
from dynamic_dino.data.datasets import load_datasets, register_builtin
from dynamic_dino.data.mapper import TestMapper
from dynamic_dino.data.synthetic.drawn import write_drawn_dataset
from dynamic_dino.evaluation import DatasetPredictions, bootstrap
from dynamic_dino.evaluation.coco import read_ground_truth
from helpers.seeds import fresh_rng
from lib import novel
from lib import tables as results
from model_zoo import as_rows, by_name

NEAR, FAR, GONE, LEARNT = 2, 3, 4, 1  # category ids; the near one is a near-synonym of the learnt


@pytest.fixture
def file(tmp_path):
    """Drawn shapes, three of whose names are held out; one of these has no objects."""
    file = write_drawn_dataset(tmp_path, num_images=24, size=48, split="val")
    content = json.loads(file.read_text())
    for category in content["categories"]:
        category["novel"] = category["id"] in (NEAR, FAR, GONE)
        category["near_synonyms"] = [LEARNT] if category["id"] == NEAR else []
        if category["id"] == GONE:  # near to what is held out as well
            category["near_synonyms"] = [FAR]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != GONE]
    file.write_text(json.dumps(content))
    register_builtin(tmp_path)
    yield file
    register_builtin()


def found(rows):
    keys = ("image_id", "category_id", "bbox")
    return DatasetPredictions.read(
        [{key: row[key] for key in keys} | {"score": row.get("score", 0.5)} for row in rows]
    )


def test_held_out_names_are_split_by_what_was_learnt(file):
    truth, mapper = read_ground_truth(file), TestMapper("drawn_val", 64, prompt_names=3)
    groups = novel.held_out(truth, "drawn_val", mapper)
    assert groups == {"_novel": [NEAR, FAR], "_near": [NEAR], "_far": [FAR]}

    right = [a for a in truth["annotations"] if a["category_id"] in (NEAR, LEARNT)]
    scores = bootstrap(truth, found(right), samples=5, groups=groups)
    values = {metric: scores[metric].value for metric in ("AP_near", "AP50_far", "AP50_novel")}
    assert values == pytest.approx({"AP_near": 100, "AP50_far": 0, "AP50_novel": 50})
    rows = list(by_name(truth, found(right), groups).values())
    assert [(row["AP50"], row["near_synonym"]) for row in rows] == [(100, True), (0, False)]
    objects = [sum(a["category_id"] == name for a in truth["annotations"]) for name in (NEAR, FAR)]
    assert [row["objects"] for row in rows] == objects


def test_without_objects_of_held_out_names_there_are_no_groups(file):
    mapper = TestMapper("drawn_val", 64)
    truth = read_ground_truth(file)
    truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] == LEARNT]
    assert novel.held_out(truth, "drawn_val", mapper) == {}


@pytest.mark.parametrize("prompt_names", [3, "all"])
def test_asked_names_are_those_of_the_prompts(file, prompt_names):
    mapper = TestMapper("drawn_val", 64, prompt_names=prompt_names)
    asked = novel.asked_names("drawn_val", mapper)
    for record in load_datasets("drawn_val"):
        classes = mapper(record)["prompt_classes"]
        assert asked[record["image_id"]] == [1 + i for i in classes]
    assert len({tuple(names) for names in asked.values()}) == (1 if prompt_names == "all" else 24)


def one_object_an_image(count):
    """A truth in which every image has one object of the first of a few names."""
    box = {"bbox": [0.0, 0.0, 10.0, 10.0], "area": 100.0, "iscrowd": 0, "category_id": 7}
    return read_ground_truth(
        {
            "images": [{"id": i} for i in range(count)],
            "annotations": [box | {"id": i + 1, "image_id": i} for i in range(count)],
            "categories": [{"id": i, "name": str(i)} for i in range(7, 12)],
        }
    )


@pytest.mark.parametrize("names", [2, 4])
def test_chance_of_the_right_box_is_one_in_the_names_that_are_asked(names):
    truth = one_object_an_image(200)
    asked = {i: list(range(7, 7 + names)) for i in range(200)}
    perfect = found(truth["annotations"])
    groups = {"_novel": [7], "_near": [7], "_far": []}
    luck = novel.chance(
        truth, perfect, asked, groups, draws=40, seed=int(fresh_rng().integers(1 << 30))
    )
    assert set(luck) == {"AP_novel", "AP50_novel", "AP_near", "AP50_near"}
    # 8000 boxes, so four deviations are below 2.3; a recall counts from its percent on
    assert luck["AP50_novel"].value == pytest.approx(100 / names, abs=2.8)
    assert luck["AP50_novel"].low < luck["AP50_novel"].value < luck["AP50_novel"].high
    assert (perfect.category_ids == 7).all(), "what was found stays as it is"


def test_where_nothing_else_is_asked_chance_is_what_was_found():
    truth = one_object_an_image(9)
    half = found(truth["annotations"][:3])
    luck = novel.chance(truth, half, {i: [7] for i in range(9)}, {"_novel": [7]}, draws=2)
    assert luck["AP50_novel"].value == pytest.approx(100 * 34 / 101)  # recalls 0 to .33


def test_names_change_places_within_a_photo(monkeypatch):
    """Boxes of one name keep one name, of two names two, and none gets a name that isn't asked."""
    rng = fresh_rng()
    asked = {i: rng.choice(range(7, 12), 3, replace=False).tolist() for i in range(30)}
    rows = [
        {"image_id": i, "category_id": asked[i][k], "bbox": [k, 0, 9, 9], "score": rng.random()}
        for i in range(30)
        for k in (0, 0, 1)
    ]
    seen = []

    def watch(truth, renamed, times, groups):
        seen.append(renamed)
        return {}

    monkeypatch.setattr(novel, "resampled_ap", watch)
    novel.chance(one_object_an_image(30), before := found(rows), asked, {}, draws=3)
    orders = {tuple(renamed.category_ids) for renamed in seen}
    assert len(orders) == 3
    for renamed in seen:
        assert renamed.scores.tolist() == before.scores.tolist()
        assert renamed.boxes.tolist() == before.boxes.tolist()
        names = renamed.category_ids.reshape(30, 3).tolist()
        for i, (first, second, third) in enumerate(names):
            assert first == second != third and {first, third} <= {*asked[i]}


def test_the_table_names_chance_and_the_difference():
    interval = {"value": 20.0, "low": 15.0, "high": 25.0}
    scores = {f"{kind}_{group}": interval for kind in ("AP", "AP50") for group in GROUPS}
    names = {
        str(i): {"objects": 1, "AP50": score, "near_synonym": near}
        for i, (score, near) in enumerate([(30, True), (20, True), (9, False), (11, False)])
    }
    luck = {metric: interval | {"value": 4.0} for metric in scores}
    row = {"tests": {"val_novel": {"scores": scores, "chance": luck, "names": names}}}
    text = results.model_zoo_novel({"models": {"mine": row, "other": {"tests": {}}}})
    what = "| Stamps val_novel, 30 names |"
    assert f"{what} 4 held-out names | AP50 | 20.0 [15.0, 25.0]; 4.0 |" in text
    assert f"{what} 2 of them without | AP | 20.0 [15.0, 25.0]; 4.0 |" in text
    assert f"{what} with less without, interval over names | AP50 | +15.0 ± 5" in text
    assert "`mine`" in text and "`other`" not in text
    assert not results.model_zoo_novel({"models": {"other": {"tests": {}}}})


GROUPS = ("novel", "near", "far")


def test_rows_of_the_results_are_plain(file):
    truth, mapper = read_ground_truth(file), TestMapper("drawn_val", 64, prompt_names=3)
    groups = novel.held_out(truth, "drawn_val", mapper)
    asked = novel.asked_names("drawn_val", mapper)
    luck = as_rows(novel.chance(truth, found(truth["annotations"]), asked, groups, draws=2))
    assert json.loads(json.dumps(luck)) == luck and set(luck) == {
        f"{kind}_{group}" for kind in ("AP", "AP50") for group in GROUPS
    }
