"""Precision and recall at a threshold: a case by hand, and pycocotools' matching."""

import json
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
from dynamic_dino.evaluation import best_point, operating_points
from dynamic_dino.evaluation.cli import main
from helpers.seeds import fresh_rng
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

A, B, FAR = [0, 0, 10, 10], [20, 0, 10, 10], [100, 100, 10, 10]


def truth_of(objects, images=(1, 2, 3)):
    """(image, category, box, crowd) each."""
    return {
        "images": [{"id": i, "width": 200, "height": 200} for i in images],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": k}
            for n, (i, c, b, k) in enumerate(objects, start=1)
        ],
    }


def found(*rows):
    keys = ("image_id", "category_id", "bbox", "score")
    return [dict(zip(keys, row, strict=True)) for row in rows]


TRUTH = truth_of([(1, 1, A, 0), (1, 1, B, 0), (1, 2, A, 0), (2, 1, [50, 50, 100, 100], 1)])
FOUND = found(
    (1, 1, A, 0.9),  # right
    (1, 1, [1, 0, 10, 10], 0.8),  # its object is taken: wrong
    (2, 1, [60, 60, 10, 10], 0.7),  # in a crowd: doesn't count
    (1, 2, B, 0.6),  # no dog there: wrong
    (1, 1, [22, 0, 10, 10], 0.5),  # IoU 8 / 12: right
    (3, 2, FAR, 0.4),  # wrong
)


def test_by_hand():
    (at_6, at_5, none), best = operating_points(TRUTH, FOUND, [0.6, 0.5, 0.95])
    assert (at_6.boxes, at_6.precision, at_6.recall) == (3, *map(pytest.approx, (100 / 3,) * 2))
    assert (at_5.boxes, at_5.precision, at_5.recall) == (
        4,
        pytest.approx(50),
        pytest.approx(200 / 3),
    )
    assert at_5.f1 == pytest.approx(2 * 50 * (200 / 3) / (50 + 200 / 3))
    assert at_5.per_image == pytest.approx(4 / 3) and at_5.images == pytest.approx(100 / 3)
    assert (none.boxes, none.precision, none.recall, none.f1, none.images) == (0, 0, 0, 0, 0)
    assert best == at_5, "F1: .5 at .9, .4, .33, .57, .5 at .4"


def test_at_equal_f1_the_highest_threshold():
    truth = truth_of([(1, 1, A, 0), (2, 1, A, 0)])
    predictions = found((1, 1, A, 0.9), (1, 1, FAR, 0.8), (3, 1, A, 0.7), (2, 1, A, 0.6))
    _, best = operating_points(truth, predictions, [])
    assert best.f1 == pytest.approx(200 / 3) and best.threshold == 0.9


def test_equal_scores_are_in_together():
    predictions = found((1, 1, A, 0.5), (1, 1, FAR, 0.5), (3, 1, FAR, 0.5))
    _, best = operating_points(TRUTH, predictions, [])
    assert (best.threshold, best.boxes) == (0.5, 3)


@pytest.mark.parametrize("truth", [TRUTH, truth_of([])])
def test_without_boxes(truth):
    (point,), best = operating_points(truth, [], [0.2])
    assert best is None and (point.boxes, point.precision, point.recall) == (0, 0, 0)


def test_without_objects():
    (point,), best = operating_points(truth_of([]), FOUND, [0.2])
    assert (point.precision, point.recall, point.f1, best.f1) == (0, 0, 0, 0)


def test_the_best_point():
    """F1 at .9: 50; at .8: 40; at .6: 33; at .5: 57; at .4: 50."""
    points, best = operating_points(TRUTH, FOUND, [0.95, 0.9, 0.8, 0.6, 0.5, 0.4])
    assert best_point(points) == best and best.threshold == 0.5
    assert best_point([points[1], points[5]]).threshold == 0.9
    assert best_point(points[:1]) is None, "no box is no precision"


def reference(truth, predictions, threshold):
    """By pycocotools: the boxes from the threshold on, matched alone: hits, boxes, objects."""
    kept = [row for row in predictions if row["score"] >= threshold]
    with redirect_stdout(StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(kept), "bbox")
        evaluator.params.iouThrs = np.array([0.5])
        evaluator.params.areaRng = [[0, 1e10]]
        evaluator.params.areaRngLbl = ["all"]
        evaluator.evaluate()
    hits = boxes = objects = 0
    for part in filter(None, evaluator.evalImgs):
        counted = ~part["dtIgnore"][0].astype(bool)
        hits += int((counted & (part["dtMatches"][0] > 0)).sum())
        boxes += int(counted.sum())
        objects += int((part["gtIgnore"] == 0).sum())
    return hits, boxes, objects


def test_matching_is_pycocotools():
    """Crowded random pictures: many boxes overlap several objects, of which some are crowds."""
    rng = fresh_rng()

    def boxes(n):
        return np.concatenate([rng.uniform(0, 30, (n, 2)), rng.uniform(8, 30, (n, 2))], 1).tolist()

    objects = [
        (int(rng.integers(1, 9)), int(rng.integers(1, 3)), box, int(rng.random() < 0.15))
        for box in boxes(60)
    ]
    truth = truth_of(objects, range(1, 10))
    near = [
        (np.array(box) + rng.normal(0, 2, 4)).clip(0.1).tolist() for _, _, box, _ in objects * 2
    ]
    where = [(i, c) for i, c, _, _ in objects * 2]
    where += [(int(rng.integers(1, 10)), int(rng.integers(1, 3))) for _ in range(40)]
    predictions = found(
        *(
            (i, c, box, float(rng.random()))
            for (i, c), box in zip(where, near + boxes(40), strict=True)
        )
    )
    thresholds = [0.0, 0.3, 0.6, 0.9]
    points, best = operating_points(truth, predictions, thresholds)
    for threshold, point in zip([*thresholds, best.threshold], [*points, best], strict=True):
        hits, count, objects = reference(truth, predictions, threshold)
        assert point.boxes == count and hits > 0
        assert point.precision == pytest.approx(100 * hits / count)
        assert point.recall == pytest.approx(100 * hits / objects)
    every, _ = operating_points(truth, predictions, [row["score"] for row in predictions])
    assert best.f1 == max(point.f1 for point in every)


def test_the_command(tmp_path, capsys):
    (tmp_path / "truth.json").write_text(json.dumps(TRUTH))
    (tmp_path / "found.json").write_text(json.dumps(FOUND))
    command = [str(tmp_path / "found.json"), "--dataset", str(tmp_path / "truth.json")]
    out = tmp_path / "out.json"
    assert main([*command, "--operating-point", "0.6", "--json", str(out)]) == 0
    printed = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
    ]
    assert ["asked for", "0.600", "33.3", "33.3", "33.3", "3", "1.00", "33.3"] in printed
    assert ["best F1", "0.500", "50.0", "66.7", "57.1", "4", "1.33", "33.3"] in printed
    points = json.loads(out.read_text())["operating_points"]
    assert points["at"][0]["boxes"] == 3 and points["best"]["threshold"] == 0.5
    main(command)
    assert "best F1" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command, "--operating-point", "0.2", "--protocol", "lvis"])
    assert "use --protocol coco" in capsys.readouterr().err
