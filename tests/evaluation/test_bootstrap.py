"""AP of resampled images equals pycocotools' on images that are really copied."""

import json
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
from dynamic_dino.evaluation import bootstrap, coco_ap
from dynamic_dino.evaluation.bootstrap import resampled_ap
from dynamic_dino.evaluation.cli import main
from helpers.seeds import examples, fresh_rng
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

IMAGES = 6


def pictures(rng, near=2.5):
    """Crowded pictures of two seen classes and a novel one, and what a detector might find."""

    def boxes(n):
        return np.concatenate([rng.uniform(0, 40, (n, 2)), rng.uniform(8, 30, (n, 2))], 1).round(2)

    objects = boxes(40)
    images, classes = rng.integers(1, IMAGES + 1, 40), rng.integers(1, 4, 40)
    truth = {
        "images": [{"id": i} for i in range(1, IMAGES + 1)],
        "categories": [{"id": c, "name": str(c), "novel": c == 3} for c in (1, 2, 3)],
        "annotations": [
            {
                "id": n + 1,
                "image_id": int(images[n]),
                "category_id": int(classes[n]),
                "bbox": objects[n].tolist(),
                "area": float(objects[n, 2:].prod()),
                "iscrowd": int(rng.random() < 0.15),
            }
            for n in range(40)
        ],
    }
    found = np.concatenate([objects + rng.normal(0, near, (40, 4)), boxes(30)]).clip(0.1)
    where = np.concatenate([images, rng.integers(1, IMAGES + 1, 30)])
    what = np.concatenate([classes, rng.integers(1, 4, 30)])
    scores = rng.permutation(70) / 70  # no two alike: their order would be that of the images
    keys = ("image_id", "category_id", "bbox", "score")
    rows = zip(where.tolist(), what.tolist(), found.tolist(), scores.tolist(), strict=True)
    return truth, [dict(zip(keys, row, strict=True)) for row in rows]


def copied(truth, found, times):
    """Each image as often as `times` says, every copy with an id of its own."""
    copies = [(i + 1, 100 * copy + i + 1) for i, n in enumerate(times) for copy in range(n)]
    annotations = [
        a | {"image_id": to}
        for of, to in copies
        for a in truth["annotations"]
        if a["image_id"] == of
    ]
    return truth | {
        "images": [{"id": to} for _, to in copies],
        "annotations": [a | {"id": n} for n, a in enumerate(annotations, start=1)],
    }, [row | {"image_id": to} for of, to in copies for row in found if row["image_id"] == of]


def reference(truth, found, category_ids, max_dets):
    with redirect_stdout(StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluator.params.maxDets = [max_dets]
        evaluator.params.catIds = category_ids
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.evaluate()
        evaluator.accumulate()
    precision = evaluator.eval["precision"]
    return tuple(
        100 * p[p > -1].mean() if (p > -1).any() else np.nan for p in (precision, precision[0])
    )


@settings(max_examples=examples(15), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    times=st.lists(st.integers(0, 3), min_size=IMAGES, max_size=IMAGES).filter(any),
    max_dets=st.sampled_from([100, 3]),
)
def test_resampling_is_copying_the_images(seed, times, max_dets):
    truth, found = pictures(np.random.default_rng(seed))
    values = resampled_ap(
        truth, found, np.array([times]), max_dets=max_dets, groups={"_novel": [3]}
    )
    anew = copied(truth, found, times)
    for suffix, category_ids in (("", [1, 2, 3]), ("_novel", [3])):
        expected = reference(*anew, category_ids, max_dets)
        mine = [values[f"{metric}{suffix}"][0] for metric in ("AP", "AP50")]
        assert mine == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_intervals():
    truth, found = pictures(fresh_rng())
    intervals = bootstrap(truth, found, samples=200)
    metrics = coco_ap(truth, found).metrics
    assert {*intervals} == {k + s for k in ("AP", "AP50") for s in ("", "_seen", "_novel")}
    for metric, interval in intervals.items():
        assert interval.value == pytest.approx(metrics[metric])
        assert 0 <= interval.low < interval.value < interval.high <= 100
    narrow = bootstrap(truth, found, samples=200, level=0.5)
    assert intervals["AP"].low < narrow["AP"].low < narrow["AP"].high < intervals["AP"].high
    assert bootstrap(truth, found, samples=200) == intervals != bootstrap(truth, found, seed=1)


def test_differences_are_of_the_same_images():
    """A detector that is worse by a little on every image is known to be worse, however much the
    images differ."""
    rng = fresh_rng()
    truth, found = pictures(rng)
    same = bootstrap(truth, found, found, samples=50)
    assert all((d.value, d.low, d.high) == (0, 0, 0) for d in same.values())
    worse, seen = [], set()
    for row in sorted(found, key=lambda row: -row["score"]):
        if row["image_id"] in seen:
            worse.append(row)
        seen.add(row["image_id"])  # its best box is lost
    there = bootstrap(truth, found, worse, samples=200)["AP"]
    back = bootstrap(truth, worse, found, samples=200)["AP"]
    assert (there.value, there.low, there.high) == pytest.approx(
        (-back.value, -back.high, -back.low)
    )
    alone = bootstrap(truth, found, samples=200)["AP"]
    assert there.high - there.low < alone.high - alone.low


def test_what_has_no_interval():
    truth, found = pictures(fresh_rng())
    empty = truth | {"annotations": []}
    assert bootstrap(empty, found, samples=5) == {}
    nothing = bootstrap(truth, [], samples=5)["AP"]
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)
    for wrong, message in (
        (dict(samples=1), "take 1000"),
        (dict(level=95), "between 0 and 1"),
        (dict(ground_truth=empty | {"images": []}, predictions=[]), "no images"),
    ):
        with pytest.raises(ValueError, match=message):
            bootstrap(**(dict(ground_truth=truth, predictions=found) | wrong))


def test_the_command(tmp_path, capsys):
    truth, found = pictures(fresh_rng())
    for name, content in (("truth", truth), ("new", found), ("old", found[:30])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    new, old, of = (str(tmp_path / f"{name}.json") for name in ("new", "old", "truth"))
    out = tmp_path / "out.json"
    command = [new, "--dataset", of, "--bootstrap", "50"]
    assert main([*command, "--against", old, "--json", str(out)]) == 0
    results, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert "intervals by bootstrap" in printed and "Differences to the other" in printed
    for key, other in (("intervals", None), ("differences", old)):
        interval = bootstrap(of, new, other, samples=50)["AP50"]
        assert results[key]["AP50"]["high"] == interval.high
        assert f"{interval.low:.1f}" in printed
    for wrong, message in (
        ([new, "--dataset", of, "--against", old], "add --bootstrap"),
        ([*command, "--protocol", "lvis"], "use --protocol coco"),
    ):
        with pytest.raises(SystemExit):
            main(wrong)
        assert message in capsys.readouterr().err
