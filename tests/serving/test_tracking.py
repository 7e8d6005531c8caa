"""Objects keep their numbers, whatever the order in which a detector names them."""

import sys

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from dynamic_dino.data.visualization import draw_detections
from dynamic_dino.modeling.phrases import Phrases
from dynamic_dino.serving.inference import detection_records
from dynamic_dino.serving.tracking import Tracker
from helpers.seeds import examples
from hypothesis import given, settings
from hypothesis import strategies as st


def found(objects):
    """Instances of (name, score, left, top), 20 x 20 pixels."""
    instances = Instances((200, 400))
    boxes = [[x, y, x + 20, y + 20] for _, _, x, y in objects]
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.tensor([score for _, score, _, _ in objects])
    instances.phrases = Phrases(name for name, *_ in objects)
    return instances


@settings(max_examples=examples(10), deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.floats(-2, 2)), min_size=1, max_size=5),
    st.lists(st.floats(0.02, 0.06), min_size=3, max_size=12),
    st.randoms(use_true_random=False),
)
def test_an_object_keeps_its_number(objects, gaps, random):
    """Objects below each other that move sideways, at times of no constant rate."""
    tracker, numbers, seconds = Tracker(0.3, 25), {}, 0.0
    for step, gap in enumerate(gaps):
        seconds += gap
        there = list(enumerate(objects))
        random.shuffle(there)
        instances = tracker.update(
            found([(n, 0.5, 200 + 25 * v * seconds, 40 * i) for i, (n, v) in there]), seconds
        )
        assert len(instances) == len(objects), "in their order"
        for (i, _), number in zip(there, instances.track_ids.tolist(), strict=True):
            if step:
                assert number == numbers.setdefault(i, number) > 0
    assert len({*numbers.values()}) == len(objects) == max(numbers.values())
    assert tracker.counts == {n: sum(o[0] == n for o in objects) for n, _ in objects}


def test_weak_detections_go_on_with_tracks_but_begin_none():
    tracker = Tracker(0.4, 10)
    scores = [0.6, 0.5, 0.25, 0.3, 0.5]
    for i, score in enumerate(scores):
        instances = tracker.update(found([("a", score, 5, 5), ("a", 0.3, 300, 5)]), i / 10)
        assert instances.scores.tolist() == [pytest.approx(score)]
        assert instances.track_ids.tolist() == [min(i, 1)]
    assert tracker.floor == 0.2 and tracker.counts == {"a": 1}


def test_what_is_lost_is_forgotten_but_not_its_number():
    tracker = Tracker(0.4, 10)
    for start in (0, 100, 200):
        for i in range(3):
            ids = tracker.update(found([("a", 0.9, 5, 5)]), start + i / 10).track_ids.tolist()
        assert ids == [1 + start // 100]
        for i in range(4):
            assert len(tracker.update(found([]), start + 10 + i)) == 0
        assert not tracker._trackers and not tracker._numbers
    assert tracker.counts == {"a": 3}


def test_numbers_are_in_records_and_pictures():
    tracker = Tracker(0.4, 10)
    tracker.update(found([("a", 0.9, 5, 5)]), 0)
    instances = tracker.update(found([("a", 0.9, 5, 5), ("b", 0.8, 100, 100)]), 0.1)
    assert [(r["phrase"], r["track"]) for r in detection_records(instances)] == [
        ("a", 1),
        ("b", None),
    ]
    page = np.zeros((200, 400, 3), np.uint8)
    tracked = draw_detections(page, instances)
    instances.remove("track_ids")
    assert "track" not in detection_records(instances)[0]
    assert (tracked != draw_detections(page, instances)).any()


@pytest.mark.parametrize("missing", ["trackers", "supervision"])
def test_what_is_missing_is_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=f"tracking needs {missing}.*pip install --no-deps"):
        Tracker(0.3)
