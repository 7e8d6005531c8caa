"""Hard objects and owners against loops; combinations of experts by class."""

import numpy as np
import pytest
from dynamic_dino.analysis.combinations import (
    chance_information,
    class_expert_shares,
    combination,
    information,
    label,
    object_combinations,
    preferences,
)
from dynamic_dino.analysis.objects import objects_of, tail_classes


def iou_and_share(a, b):
    """IoU of x, y, w, h; and the share of a that lies in b."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(w, 0) * max(h, 0)
    return common / (a[2] * a[3] + b[2] * b[3] - common), common / (a[2] * a[3])


def test_against_loops(scene, rng):
    collection = scene()
    annotations = collection.truth["annotations"]
    for annotation in annotations:
        annotation["area"] = float(rng.uniform(500, 1500))
        if rng.random() < 0.2:
            annotation["occluded"] = bool(rng.random() < 0.5)
    objects = objects_of(collection)
    real = [a for a in annotations if not a["iscrowd"]]
    assert objects.annotations == real and len(objects) == len(real)
    counts = {c: sum(a["category_id"] == c for a in real) for c in {a["category_id"] for a in real}}
    fewest = sorted(counts, key=lambda c: (counts[c], c))[: len(counts) // 3]
    found = collection.predictions
    for i, a in enumerate(real):
        others = [b for b in real if b is not a and b["image_id"] == a["image_id"]]
        covered = any(iou_and_share(a["bbox"], b["bbox"])[1] >= 0.3 for b in others)
        assert objects.occluded[i] == a.get("occluded", covered)
        assert objects.small[i] == (a["area"] < 1024)
        assert objects.tail[i] == (a["category_id"] in fewest)
        best, best_iou = -1, 0.0
        for k in np.flatnonzero(found.image_ids == a["image_id"]):
            iou = iou_and_share(a["bbox"], found.boxes[k])[0]
            if iou > best_iou:
                best, best_iou = k, iou
        assert objects.owner[i] == best and objects.iou[i] == pytest.approx(best_iou)


def test_the_tail_of_graded_classes():
    categories = [{"id": i, "frequency": f} for i, f in enumerate("rcfr")]
    truth = {"categories": categories, "annotations": []}
    assert tail_classes(truth) == {0, 3}
    truth["categories"] = [{"id": 0, "frequency": "f"}, {"id": 1}]
    assert tail_classes(truth) == set()  # graded, none of them rare


@pytest.mark.parametrize("category", [int, str, lambda i: i + 2**70])
def test_combinations_of_objects(scene, category):
    collection = scene()
    for annotation in collection.truth["annotations"]:
        annotation["category_id"] = category(annotation["category_id"])
    objects = objects_of(collection)
    found = object_combinations(collection, objects, 1)
    expected = [
        (c, tuple(sorted(collection.experts[o, 1].tolist())))
        for c, o, iou in zip(objects.category_ids, objects.owner, objects.iou, strict=True)
        if iou >= 0.5
    ]
    assert found == expected
    assert combination(np.array([2, 5, -1])) == (2, 5) and label((2, 5)) == "2, 5"
    assert label(combination(np.array([-1]))) == "none"


def test_preferences():
    pairs = [(1, (0, 3))] * 6 + [(1, (1, 7))] * 2 + [(2, (1, 7))] * 4 + [(3, (0, 3))] * 2
    first, second = preferences(pairs, {1: "refrigerator", 2: "coat", 3: "too few"})
    assert (second.name, second.experts, second.objects) == ("refrigerator", (0, 3), 8)
    assert second.share == pytest.approx(6 / 8) and second.lift == pytest.approx(6 / 8 / (8 / 14))
    assert (first.name, first.share) == ("coat", 1) and first.lift == pytest.approx(14 / 6)
    shares = class_expert_shares(pairs, 8, [1, 2])
    assert shares[0].tolist() == [6 / 16, 2 / 16, 0, 6 / 16, 0, 0, 0, 2 / 16]
    assert shares[1].tolist() == [0, 0.5, 0, 0, 0, 0, 0, 0.5]


def test_information():
    told = [(c, (c, c + 1)) for c in range(4)] * 5
    assert information(told) == pytest.approx(1)
    independent = [(c, (e,)) for c in range(4) for e in range(3)]
    assert information(independent) == pytest.approx(0, abs=1e-12)
    assert information([(1, (0, 1))] * 3) == 0 and information([]) == 0
    assert 0 < chance_information(told) < 0.7  # few objects tell something by chance
