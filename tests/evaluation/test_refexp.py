"""P@k by hand, and against a loop."""

import numpy as np
import pytest
from dynamic_dino.evaluation import refexp_precision
from helpers.seeds import fresh_rng

TARGET = [100.0, 100.0, 40.0, 20.0]


def expressions(count):
    return {
        "images": [{"id": i, "caption": f"expression {i}"} for i in range(1, count + 1)],
        "categories": [{"id": 1, "name": "object"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": TARGET} for i in range(1, count + 1)
        ],
    }


def found(image_id, *boxes):
    """Boxes with falling scores."""
    return [
        {"image_id": image_id, "category_id": 1, "bbox": box, "score": 0.9 - 0.01 * i}
        for i, box in enumerate(boxes)
    ]


MISS = [300.0, 300.0, 40.0, 20.0]


def test_by_hand():
    predictions = [
        *found(1, TARGET),  # a hit at once
        *found(2, MISS, TARGET),  # the second: P@5
        *found(3, *[MISS] * 4, TARGET),  # the fifth: P@5
        *found(4, *[MISS] * 5, TARGET),  # the sixth: P@10
        *found(5, *[MISS] * 10, TARGET),  # the eleventh: too late
        *found(6, [100.0, 100.0, 40.0, 10.0]),  # half of the target: IoU 0.5 is a hit
        *found(7, [100.0, 100.0, 40.0, 9.9]),  # a little less isn't
        # nothing for the eighth
    ]
    fresh_rng().shuffle(predictions)
    result = refexp_precision(expressions(8), predictions)
    assert result.metrics == {"P@1": 100 * 2 / 8, "P@5": 100 * 4 / 8, "P@10": 100 * 5 / 8}
    assert result.per_class == []

    some = refexp_precision(expressions(8), predictions, ks=[2], image_ids=[2, 3])
    assert some.metrics == {"P@2": 50}
    assert refexp_precision(expressions(8), predictions, iou=0.49).metrics["P@1"] == 100 * 3 / 8
    assert refexp_precision(expressions(3), []).metrics == {"P@1": 0, "P@5": 0, "P@10": 0}
    assert set(refexp_precision(expressions(3), [], image_ids=[]).metrics.values()) == {-1}


def test_of_equal_scores_the_first_counts():
    predictions = found(1, MISS, TARGET)
    predictions[1]["score"] = predictions[0]["score"]
    assert refexp_precision(expressions(1), predictions).metrics["P@1"] == 0
    assert refexp_precision(expressions(1), predictions[::-1]).metrics["P@1"] == 100


def test_random_boxes_against_a_loop():
    rng = fresh_rng()
    truth = expressions(60)
    predictions = []
    for a in truth["annotations"]:
        a["bbox"] = rng.uniform(20, 200, 4).tolist()
        boxes = np.array(a["bbox"]) * (1 + rng.normal(0, 0.25, (rng.integers(0, 30), 4)))
        predictions += found(a["image_id"], *boxes.tolist())
    rng.shuffle(predictions)
    hits = {k: 0 for k in (1, 5, 10)}
    for a in truth["annotations"]:
        x, y, w, h = a["bbox"]
        mine = [p for p in predictions if p["image_id"] == a["image_id"]]
        mine.sort(key=lambda p: -p["score"])
        good = []
        for p in mine:
            u, v, s, t = p["bbox"]
            shared = max(min(x + w, u + s) - max(x, u), 0) * max(min(y + h, v + t) - max(y, v), 0)
            good.append(shared / (w * h + s * t - shared) >= 0.5)
        for k in hits:
            hits[k] += any(good[:k])
    metrics = refexp_precision(truth, predictions).metrics
    assert metrics == {f"P@{k}": pytest.approx(100 * n / 60) for k, n in hits.items()}
    assert 0 < metrics["P@1"] < metrics["P@10"]


def test_bad_input_is_named():
    truth = expressions(3)
    truth["annotations"].pop(1)
    with pytest.raises(ValueError, match="expression 2 .* has no box, and 0 others"):
        refexp_precision(truth, [])
    truth["annotations"].append(truth["annotations"][0] | {"id": 99})
    with pytest.raises(ValueError, match="expression 1 .* has several boxes"):
        refexp_precision(truth, [])
    with pytest.raises(ValueError, match="at least one k"):
        refexp_precision(expressions(3), [], ks=[])
    with pytest.raises(ValueError, match="image_id 9 is not in the ground truth"):
        refexp_precision(expressions(3), found(9, TARGET))
