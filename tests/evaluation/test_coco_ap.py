"""COCO AP against pycocotools, on random scenes with crowds, ties and empty classes."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from dynamic_dino.evaluation import class_groups, coco_ap
from helpers.seeds import fresh_rng
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

STATS = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()


def random_truth(rng, images=30, classes=9):
    """COCO content; the last class has no object, the ids are neither contiguous nor sorted."""
    category_ids = [int(i) for i in rng.permutation(np.arange(3, 3 + 4 * classes, 4))]
    annotations = []
    for image_id in range(1, images + 1):
        for _ in range(rng.integers(0, 12)):
            size = np.exp(rng.uniform(np.log(8), np.log(300), 2))
            corner = rng.uniform(0, 500 - size)
            fill = rng.uniform(0.4, 1.0)  # the area of a mask, not of its box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id * 7,
                    "category_id": int(rng.choice(category_ids[:-1])),
                    "bbox": [float(v) for v in (*corner, *size)],
                    "area": float(size.prod() * fill),
                    "iscrowd": int(rng.random() < 0.1),
                    "ignore": int(rng.random() < 0.1),  # which COCO's evaluation doesn't heed
                }
            )
    return {
        "images": [{"id": i * 7, "width": 500, "height": 500} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"thing {i}"} for i in category_ids],
    }


def random_predictions(rng, truth, crowded=False):
    """Jittered objects, some of the wrong class, doubles, and clutter; rounded scores tie."""
    category_ids = [c["id"] for c in truth["categories"]]
    predictions = []
    for a in truth["annotations"]:
        for _ in range(rng.integers(0, 3)):
            box = np.array(a["bbox"]) * (1 + rng.normal(0, 0.12, 4))
            wrong = rng.random() < 0.2
            predictions.append(
                {
                    "image_id": a["image_id"],
                    "category_id": int(rng.choice(category_ids)) if wrong else a["category_id"],
                    "bbox": [float(v) for v in box.clip(0.5)],
                    "score": round(float(rng.random()), 2),
                }
            )
    for image in truth["images"]:
        for _ in range(150 if crowded else 15):
            predictions.append(
                {
                    "image_id": image["id"],
                    "category_id": category_ids[0] if crowded else int(rng.choice(category_ids)),
                    "bbox": [float(v) for v in rng.uniform(1, 250, 4)],
                    "score": round(float(rng.random()), 2),
                }
            )
    order = rng.permutation(len(predictions))
    return [predictions[i] for i in order]


def pycocotools_evaluation(truth, predictions, category_ids=None, image_ids=None):
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = copy.deepcopy(truth)
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(copy.deepcopy(predictions)), "bbox")
        if category_ids is not None:
            evaluation.params.catIds = sorted(category_ids)
        if image_ids is not None:
            evaluation.params.imgIds = sorted(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def percent(value):
    return 100 * value if value > -1 else -1


@pytest.fixture(params=[False, True], ids=["sparse", "over 100 per image and class"])
def scene(request):
    rng = fresh_rng()
    truth = random_truth(rng, images=8 if request.param else 30)
    return truth, random_predictions(rng, truth, crowded=request.param)


def test_all_twelve_numbers_equal_pycocotools(scene):
    truth, predictions = scene
    ours = coco_ap(truth, predictions).metrics
    reference = pycocotools_evaluation(truth, predictions).stats
    assert 0 < ours["AP"] < 100
    for name, value in zip(STATS, reference, strict=True):
        assert ours[name] == pytest.approx(percent(value), abs=1e-6), name


def test_every_class_equals_pycocotools(scene):
    truth, predictions = scene
    rows = {row["id"]: row for row in coco_ap(truth, predictions).per_class}
    evaluation = pycocotools_evaluation(truth, predictions)
    assert sorted(rows) == evaluation.params.catIds
    for k, category in enumerate(evaluation.params.catIds):
        precision = evaluation.eval["precision"][:, :, k, 0, -1]
        real = [
            a for a in truth["annotations"] if a["category_id"] == category and not a["iscrowd"]
        ]
        assert rows[category]["objects"] == len(real)
        assert rows[category]["AP"] == pytest.approx(percent(precision.mean()), abs=1e-6)
        assert rows[category]["AP50"] == pytest.approx(percent(precision[0].mean()), abs=1e-6)


def test_groups_equal_pycocotools_on_the_same_classes(scene):
    truth, predictions = scene
    rng = fresh_rng()
    for category in truth["categories"]:
        category["frequency"] = str(rng.choice(["r", "c", "f"]))
        category["novel"] = bool(rng.random() < 0.4)
    ours = coco_ap(truth, predictions).metrics
    checks = [(f, lambda c, f=f: c["frequency"] == f) for f in "rcf"]
    checks += [("_seen", lambda c: not c["novel"]), ("_novel", lambda c: c["novel"])]
    for suffix, belongs in checks:
        members = [c["id"] for c in truth["categories"] if belongs(c)]
        if not members:
            assert ours[f"AP{suffix}"] == -1
            continue
        stats = pycocotools_evaluation(truth, predictions, category_ids=members).stats
        assert ours[f"AP{suffix}"] == pytest.approx(percent(stats[0]), abs=1e-6), suffix
        assert ours[f"AP50{suffix}"] == pytest.approx(percent(stats[1]), abs=1e-6), suffix


def test_a_subset_of_the_images_equals_pycocotools(scene):
    truth, predictions = scene
    image_ids = [image["id"] for image in truth["images"]][::2]
    ours = coco_ap(truth, predictions, image_ids=image_ids)
    reference = pycocotools_evaluation(truth, predictions, image_ids=image_ids).stats
    for name, value in zip(STATS, reference, strict=True):
        assert ours.metrics[name] == pytest.approx(percent(value), abs=1e-6), name
    objects = sum(a["image_id"] in image_ids and not a["iscrowd"] for a in truth["annotations"])
    assert sum(row["objects"] for row in ours.per_class) == objects


def test_max_dets_is_per_image_and_class():
    """Two right boxes of each of two classes; the cap of 1 must keep the best of *each* class."""
    boxes = [[0, 0, 50, 50], [100, 100, 50, 50]]
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {"id": i + 1, "image_id": 1, "category_id": 1 + i // 2, "bbox": boxes[i % 2]}
            for i in range(4)
        ],
    }
    predictions = [
        {**{k: a[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.9 - a["id"] / 10}
        for a in truth["annotations"]
    ]
    one = coco_ap(truth, predictions, max_dets=1)
    assert one.metrics["AR1"] == pytest.approx(50)
    assert [row["AP"] for row in one.per_class] == [pytest.approx(100 * 51 / 101)] * 2
    assert "AR10" not in one.metrics
    assert coco_ap(truth, predictions, max_dets=300).metrics["AR300"] == pytest.approx(100)


def test_annotation_ids_and_defaults_do_not_matter():
    """Id 0 means "unmatched" to COCO matchers; a missing area is the box's."""
    rng = fresh_rng()
    truth = random_truth(rng)
    predictions = random_predictions(rng, truth)
    for a in truth["annotations"]:
        a["area"], a["iscrowd"] = a["bbox"][2] * a["bbox"][3], 0
    expected = coco_ap(truth, predictions).metrics
    for i, a in enumerate(truth["annotations"]):
        a["id"] = i
        del a["area"], a["iscrowd"]
    before = copy.deepcopy((truth, predictions))
    assert coco_ap(truth, predictions).metrics == pytest.approx(expected)
    assert before == (truth, predictions), "the arguments were modified"


def test_files_and_their_content_are_the_same(tmp_path):
    rng = fresh_rng()
    truth = random_truth(rng)
    predictions = random_predictions(rng, truth)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "predictions.json").write_text(json.dumps(predictions))
    files = coco_ap(tmp_path / "truth.json", str(tmp_path / "predictions.json"))
    assert files.metrics == coco_ap(truth, predictions).metrics


def test_no_predictions_is_zero_and_no_ground_truth_is_minus_one():
    rng = fresh_rng()
    truth = random_truth(rng)
    assert coco_ap(truth, []).metrics["AP"] == 0
    empty = {**truth, "annotations": []}
    result = coco_ap(empty, random_predictions(rng, empty))
    assert set(result.metrics.values()) == {-1}
    assert all(row["AP"] == -1 for row in result.per_class)


def test_class_groups():
    groups = class_groups([5, 6, 7, 8], ["r", "f", None, "f"], [True, False, None, False])
    assert groups == {"r": [5], "c": [], "f": [6, 8], "_seen": [6, 8], "_novel": [5]}
    assert class_groups([5], [None], [None]) == {} == class_groups([5])
    with pytest.raises(ValueError, match="'r', 'c' or 'f'"):
        class_groups([5], ["rare"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_id": 12345}, "image_id 12345 is not in the ground truth"),
        ({"category_id": -4}, "category_id -4 is not in the ground truth"),
        ({"category_id": "cat"}, "category_id 'cat' is not in the ground truth"),
        ({"score": float("nan")}, "not finite"),
        ({"bbox": [1, 2, 3]}, "entry 1 needs"),
        ({"bbox": None}, "entry 1 needs"),
        ({"bbox": [1, 2, 3, True]}, "entry 1 needs.*True is no number"),
    ],
)
def test_bad_predictions_are_named(change, message):
    truth = random_truth(fresh_rng())
    image, category = truth["images"][0]["id"], truth["categories"][0]["id"]
    good = {"image_id": image, "category_id": category, "bbox": [1, 2, 3, 4], "score": 0.5}
    with pytest.raises(ValueError, match=message):
        coco_ap(truth, [good, good | change])


def test_bad_files_are_named(tmp_path):
    truth = random_truth(fresh_rng())
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        coco_ap(tmp_path / "nowhere.json", [])
    (tmp_path / "cut.json").write_text(json.dumps(truth)[:500])
    with pytest.raises(ValueError, match="cut.json is not valid JSON .* truncated"):
        coco_ap(tmp_path / "cut.json", [])
    with pytest.raises(ValueError, match="no list 'annotations'"):
        coco_ap({"images": [], "categories": []}, [])
    del truth["annotations"][0]["bbox"]
    with pytest.raises(ValueError, match=r"annotations\[0\].* no 'bbox'"):
        coco_ap(truth, [])
