"""LVIS AP against the `lvis` package, and fixed AP against loops that follow its definition."""

import copy
import logging

import numpy as np
import pytest
from dynamic_dino.evaluation import lvis_ap
from helpers.seeds import fresh_rng

pytestmark = pytest.mark.filterwarnings("ignore:The 'warn' method:DeprecationWarning")  # lvis's

METRICS = "AP AP50 AP75 APs APm APl APr APc APf".split()
IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}


def random_truth(rng, images=25, classes=12):
    """LVIS content: classes without objects, images with nothing known, ignored objects, crowds
    (which LVIS doesn't know), masks smaller than their boxes."""
    category_ids = [int(i) for i in rng.permutation(np.arange(5, 5 + 3 * classes, 3))]
    truth = {
        "categories": [
            {"id": c, "name": f"thing {c}", "frequency": str(rng.choice(["r", "c", "f"]))}
            for c in category_ids
        ],
        "images": [],
        "annotations": [],
    }
    for image_id in rng.permutation(1000)[:images].tolist():
        shown = rng.choice(category_ids[2:], rng.integers(0, 5), replace=False).tolist()
        rest = [c for c in category_ids if c not in shown]
        absent = rng.choice(rest, min(rng.integers(0, 5), len(rest)), replace=False).tolist()
        some = [c for c in [*shown, *absent] if rng.random() < 0.3]
        truth["images"].append(
            {
                "id": image_id,
                "width": 500,
                "height": 500,
                "neg_category_ids": absent,
                "not_exhaustive_category_ids": some,
            }
        )
        for category in shown:
            for _ in range(rng.integers(1, 4)):
                size = np.exp(rng.uniform(np.log(8), np.log(300), 2))
                truth["annotations"].append(
                    {
                        "id": len(truth["annotations"]) + 1,
                        "image_id": image_id,
                        "category_id": category,
                        "bbox": [float(v) for v in (*rng.uniform(0, 500 - size), *size)],
                        "area": float(size.prod() * rng.uniform(0.4, 1)),
                        "ignore": int(rng.random() < 0.15),
                        "iscrowd": int(rng.random() < 0.1),
                    }
                )
    return truth


def random_predictions(rng, truth, clutter=25, least=0.5):
    """Jittered objects, doubles, wrong classes, and clutter of every class; scores tie.

    Objects score `least` or more, clutter anything: so that a cap as low as a test's keeps some
    objects, as an AP of 0 proves nothing.
    """
    category_ids = [c["id"] for c in truth["categories"]]
    predictions = []

    def add(image_id, category_id, box, least=0.0):
        predictions.append(
            {
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [float(v) for v in np.clip(box, 0.5, None)],
                "score": round(float(rng.uniform(least, 1)), 2),
            }
        )

    for a in truth["annotations"]:
        for _ in range(rng.integers(0, 4)):
            wrong = int(rng.choice(category_ids))
            box = np.array(a["bbox"]) * (1 + rng.normal(0, 0.05, 4))
            add(a["image_id"], wrong if rng.random() < 0.2 else a["category_id"], box, least)
    for image in truth["images"]:
        for _ in range(clutter):
            add(image["id"], int(rng.choice(category_ids)), rng.uniform(1, 250, 4))
    return [predictions[i] for i in rng.permutation(len(predictions))]


@pytest.fixture(scope="module", autouse=True)
def old_numpy_names():
    """lvis 0.5.3 is of the time when numpy had `np.float`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "float", float, raising=False)
        yield


def lvis_package(truth, predictions, max_dets):
    """The reference's numbers; max_dets=-1: no cap, what MDETR gives to it for fixed AP."""
    pytest.importorskip("lvis", reason="`make setup` installs it")
    from lvis import LVIS, LVISEval, LVISResults

    reference = LVIS.__new__(LVIS)  # its constructor wants a file
    reference.logger = logging.getLogger("lvis")
    reference.dataset = copy.deepcopy(truth)
    reference._create_index()
    found = LVISResults(reference, copy.deepcopy(predictions), max_dets=max_dets)
    evaluation = LVISEval(reference, found, iou_type="bbox")
    evaluation.params.max_dets = max_dets
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def same(ours, value, name):
    assert ours == pytest.approx(100 * value if value > -1 else -1, abs=1e-6), name


@pytest.mark.parametrize("max_dets", [300, 20])
@pytest.mark.parametrize("attempt", range(3))
def test_every_number_equals_the_lvis_package(max_dets, attempt):
    rng = fresh_rng()
    truth = random_truth(rng)
    predictions = random_predictions(rng, truth)
    before = copy.deepcopy((truth, predictions))
    ours = lvis_ap(truth, predictions, max_dets=max_dets)
    assert before == (truth, predictions), "the arguments were modified"
    reference = lvis_package(truth, predictions, max_dets)
    assert 0 < ours.metrics["AP"] < 100
    for name in METRICS:
        same(ours.metrics[name], reference.results[name], name)
    same(ours.metrics[f"AR{max_dets}"], reference.results[f"AR@{max_dets}"], "AR")
    for size in "sml":
        same(ours.metrics[f"AR{size}"], reference.results[f"AR{size}@{max_dets}"], size)
    assert [row["id"] for row in ours.per_class] == reference.params.cat_ids
    for k, row in enumerate(ours.per_class):
        precision = reference.eval["precision"][:, :, k, 0]
        same(row["AP"], precision.mean(), row["name"])
        same(row["AP50"], precision[0].mean(), row["name"])
        real = [
            a for a in truth["annotations"] if a["category_id"] == row["id"] and not a["ignore"]
        ]
        assert row["objects"] == len(real)


# Fixed AP, once more, in loops that follow the definition. --------------------------------------


def overlap(a, b):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def slow_fixed_ap(truth, predictions, most):
    """{(class, IoU, area): AP or None}: each class's `most` best detections, then, image by image,
    the best first, each takes the free object that it overlaps most."""
    images = {image["id"]: image for image in truth["images"]}
    table = {}
    for category in [c["id"] for c in truth["categories"]]:
        found = [p for p in predictions if p["category_id"] == category]
        found = sorted(found, key=lambda p: -p["score"])[:most]
        for threshold in IOUS:
            for area, (low, high) in AREAS.items():
                total, outcomes = 0, []  # (score, hit or miss), images in the order of their ids
                for image_id in sorted(images):
                    objects = [
                        a
                        for a in truth["annotations"]
                        if a["image_id"] == image_id and a["category_id"] == category
                    ]
                    if not objects and category not in images[image_id]["neg_category_ids"]:
                        continue
                    counts = [not a["ignore"] and low <= a["area"] <= high for a in objects]
                    total += sum(counts)
                    free = [True] * len(objects)
                    for p in [p for p in found if p["image_id"] == image_id]:
                        best, best_overlap = None, threshold
                        for wanted in (True, False):  # objects that count come first
                            if best is not None:
                                break
                            for i, a in enumerate(objects):
                                if free[i] and counts[i] == wanted:
                                    iou = overlap(p["bbox"], a["bbox"])
                                    if iou >= best_overlap:
                                        best, best_overlap = i, iou
                        if best is not None:
                            free[best] = False
                            if counts[best]:
                                outcomes.append((p["score"], True))
                            continue
                        if category in images[image_id]["not_exhaustive_category_ids"]:
                            continue
                        if low <= p["bbox"][2] * p["bbox"][3] <= high:
                            outcomes.append((p["score"], False))
                if not total:
                    table[category, threshold, area] = None
                    continue
                outcomes.sort(key=lambda outcome: -outcome[0])
                curve, hits = [], 0
                for n, (_, hit) in enumerate(outcomes, start=1):
                    hits += hit
                    curve.append((hits / total, hits / n))
                at = [
                    max((precision for recall, precision in curve if recall >= r), default=0)
                    for r in RECALLS
                ]
                table[category, threshold, area] = sum(at) / len(at)
    return table


@pytest.mark.parametrize("most", [10_000, 40])
def test_fixed_ap_equals_its_definition(most):
    rng = fresh_rng()
    truth = random_truth(rng, images=10, classes=6)
    predictions = random_predictions(rng, truth, clutter=60)
    ours = lvis_ap(truth, predictions, fixed=True, max_dets=most).metrics
    table = slow_fixed_ap(truth, predictions, most)
    frequency = {c["id"]: c["frequency"] for c in truth["categories"]}

    def mean(classes=None, thresholds=IOUS, area=""):
        values = [
            ap
            for (c, t, a), ap in table.items()
            if a == area and t in thresholds and (classes is None or frequency[c] == classes)
            if ap is not None
        ]
        return 100 * sum(values) / len(values) if values else -1

    assert 0 < ours["AP"] < 100
    assert ours["AP"] == pytest.approx(mean(), abs=1e-6)
    assert ours["AP50"] == pytest.approx(mean(thresholds=IOUS[:1]), abs=1e-6)
    assert ours["AP75"] == pytest.approx(mean(thresholds=IOUS[5:6]), abs=1e-6)
    for size in "sml":
        assert ours[f"AP{size}"] == pytest.approx(mean(area=size), abs=1e-6), size
    for letter in "rcf":
        assert ours[f"AP{letter}"] == pytest.approx(mean(letter), abs=1e-6), letter


def test_fixed_ap_without_a_cap_equals_the_lvis_package_without_one():
    rng = fresh_rng()
    truth = random_truth(rng)
    predictions = random_predictions(rng, truth, clutter=400, least=0)  # 300 count
    ours = lvis_ap(truth, predictions, fixed=True).metrics
    reference = lvis_package(truth, predictions, -1)
    for name in METRICS:
        same(ours[name], reference.results[name], name)
    capped = lvis_ap(truth, predictions).metrics
    assert capped["AP"] != ours["AP"], "plain AP has a cap per image"


def test_what_each_cap_keeps():
    """One image with three detections of a frequent class above one of a rare class."""
    box = [10.0, 10.0, 50.0, 50.0]
    truth = {
        "images": [
            {"id": 1, "neg_category_ids": [], "not_exhaustive_category_ids": []},
            {"id": 2, "neg_category_ids": [2], "not_exhaustive_category_ids": []},
        ],
        "categories": [
            {"id": 1, "name": "often", "frequency": "f"},
            {"id": 2, "name": "seldom", "frequency": "r"},
        ],
        "annotations": [{"id": c, "image_id": 1, "category_id": c, "bbox": box} for c in (1, 2)],
    }
    found = [{"image_id": 1, "category_id": 1, "bbox": box, "score": s} for s in (0.9, 0.8, 0.7)]
    found += [{"image_id": 1, "category_id": 2, "bbox": box, "score": 0.1}]
    found += [{"image_id": 2, "category_id": 1, "bbox": box, "score": 1.0}]  # nothing is known
    assert lvis_ap(truth, found).metrics["APr"] == pytest.approx(100)
    assert lvis_ap(truth, found, max_dets=3).metrics["APr"] == 0
    assert lvis_ap(truth, found, fixed=True, max_dets=2).metrics["APr"] == pytest.approx(100)
    assert lvis_ap(truth, found).metrics["APf"] == pytest.approx(100)
    # The class's only kept detection is the one of which nothing is known.
    assert lvis_ap(truth, found, fixed=True, max_dets=1).metrics["APf"] == 0


def test_a_cap_per_image_is_noticed_where_fixed_ap_forbids_it(caplog):
    rng = fresh_rng()
    truth = random_truth(rng)
    image = truth["images"][0]["id"]
    found = [p | {"image_id": image} for p in random_predictions(rng, truth, clutter=40)][:301]
    lvis_ap(truth, found, fixed=True)
    lvis_ap(truth, found[:300])
    assert not caplog.text
    lvis_ap(truth, found[:300], fixed=True)
    assert "no image has more than 300 detections" in caplog.text


def test_a_subset_of_the_images_is_the_data_set_without_the_others():
    rng = fresh_rng()
    truth = random_truth(rng)
    predictions = random_predictions(rng, truth)
    ids = {image["id"] for image in truth["images"][::2]}
    part = {
        **truth,
        "images": [i for i in truth["images"] if i["id"] in ids],
        "annotations": [a for a in truth["annotations"] if a["image_id"] in ids],
    }
    expected = lvis_ap(part, [p for p in predictions if p["image_id"] in ids])
    assert lvis_ap(truth, predictions, image_ids=ids) == expected


def test_no_predictions_and_bad_input():
    rng = fresh_rng()
    truth = random_truth(rng)
    for fixed in (False, True):
        assert lvis_ap(truth, [], fixed=fixed).metrics["AP"] == 0
    del truth["images"][3]["neg_category_ids"]
    with pytest.raises(ValueError, match=r"images\[3\] .* no 'neg_category_ids'.*as COCO's"):
        lvis_ap(truth, [])
    with pytest.raises(ValueError, match="at least 1"):
        lvis_ap(truth, [], max_dets=0)
