"""Whether two lists of detections are the same within what is allowed."""

import copy

import pytest
import torch
from detectron2.structures import Boxes, Instances
from dynamic_dino.export.check import TOLERANCES, Difference, compare, difference
from helpers.seeds import examples
from hypothesis import given, settings
from hypothesis import strategies as st

SIDE = 1000


def detections(scores, boxes, classes) -> Instances:
    return Instances((SIDE, SIDE), scores=scores, pred_boxes=Boxes(boxes), pred_classes=classes)


def sure_and_doubtful(sure: int, allowed, generator) -> Instances:
    """So many that are compared, in places of their own, each also as a doubtful detection of
    another name, and one with a score that ends the list."""
    scores = torch.rand(sure, generator=generator) * (0.7 - 3 * allowed.scores)
    scores = torch.cat([scores + 0.3 + 2.5 * allowed.scores, torch.full((sure + 1,), 0.3)])
    corner = torch.stack([torch.arange(sure) * 20.0, torch.rand(sure, generator=generator) * 900])
    boxes = torch.cat([corner.T, corner.T + 15], 1)
    boxes = torch.cat([boxes, boxes, boxes.new_tensor([[0, 0, 9, 9]])])
    classes = torch.randint(3, (sure,), generator=generator)
    classes = torch.cat([classes, classes + 1, torch.zeros(1, dtype=torch.long)])
    order = scores.argsort(descending=True, stable=True)
    return detections(scores[order], boxes[order], classes[order])


@pytest.mark.parametrize("precision", TOLERANCES)
@settings(max_examples=examples(15), deadline=None)
@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 999), st.sampled_from("mfsc"))
def test_the_lost_are_counted(precision, sure, lost, seed, how):
    allowed, lost = TOLERANCES[precision], min(lost, sure)
    generator = torch.Generator().manual_seed(seed)
    ours = sure_and_doubtful(sure, allowed, generator)
    scores, boxes, classes = ours.scores, ours.pred_boxes.tensor, ours.pred_classes

    off = (2 * torch.rand(len(ours), generator=generator) - 1) * 0.9
    shift = 15 * (1 - allowed.overlap) / (1 + allowed.overlap)  # which leaves that overlap
    moved = boxes.clone()
    moved[:, [0, 2]] += off[:, None] * shift
    theirs = detections(scores + off * allowed.scores, moved, classes.clone())
    broken = torch.randperm(sure, generator=generator)[:lost]
    if how == "m":  # elsewhere
        moved[broken] += torch.tensor([0.0, 20, 0, 20]) * (2 * (moved[broken, 1:2] < 500) - 1)
    elif how == "f":  # a name that none has
        theirs.pred_classes[broken] = 7
    elif how == "s":  # much surer
        theirs.scores[broken] += 3 * allowed.scores
    else:  # as sure as before, but all in one place
        moved[broken] = torch.tensor([500.0, 950, 990, 999])
    theirs = theirs[torch.randperm(len(ours), generator=generator)]

    found = difference(ours, theirs, allowed)
    assert (found.compared, found.missing, found.extra) == (sure, lost, lost)
    assert found.within(allowed) == (lost <= allowed.lost * sure)
    kept = torch.ones(len(ours), dtype=torch.bool)
    kept[sure:], kept[broken] = False, False
    largest = (off[kept].abs().max() * allowed.scores).item() if kept.any() else 0.0
    assert found.scores == pytest.approx(largest, abs=1e-6)
    largest = (off[kept].abs().max() * shift / SIDE).item() if kept.any() else 0.0
    assert found.boxes == pytest.approx(largest, abs=1e-6)

    back = difference(theirs, ours, allowed)
    assert (back.compared, back.missing, back.extra) == (sure, lost, lost)
    same = difference(ours, ours, allowed)
    assert same.within(allowed) and (same.missing, same.scores, same.boxes) == (0, 0.0, 0.0)


@settings(max_examples=examples(20), deadline=None)
@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 40), st.integers(0, 999))
def test_close_calls_are_measured_and_excuse_no_more(sure, close, lost, seed):
    """What PyTorch alone doesn't find again when pixels are rounded otherwise."""
    allowed, close, lost = TOLERANCES["float32"], min(close, sure), min(lost, sure)
    ours = sure_and_doubtful(sure, allowed, torch.Generator().manual_seed(seed))
    model = torch.nn.Module()
    model.pixel_std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    std = model.pixel_std.clone()

    def without(count):
        other = copy.deepcopy(ours)
        other.pred_classes[:count] = 7  # a name that none has
        return other

    def reference(image, prompt, **options):
        moved = (model.pixel_std / std - 1).abs()
        assert moved.max() == 0 or (moved > 0).all() and moved.max() < 1e-6
        return without(close if moved.max() else 0)

    reference.model = model
    found = compare(reference, lambda *_, **__: without(lost), ["a", "b"], None, allowed)
    assert (found.close, found.missing, found.extra) == (2 * close, 2 * lost, 2 * lost)
    assert found.within(allowed) == (lost <= allowed.lost * sure + 2 * close)
    assert torch.equal(model.pixel_std, std)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_nothing_compared_is_never_equal(precision):
    allowed = TOLERANCES[precision]
    full = sure_and_doubtful(9, allowed, torch.Generator().manual_seed(0))
    doubtful, nothing = full[9:], full[:0]
    for ours, theirs in ((doubtful, doubtful), (nothing, nothing)):
        found = difference(ours, theirs, allowed)
        assert found.compared == 0 and not found.within(allowed)
        assert str(found).startswith(f"0 of {len(ours)} detections")
    assert not Difference().within(allowed)
    # What is shorter wasn't cut off.
    for less in (nothing, full[:5]):
        found = difference(full, less, allowed)
        assert found.missing >= 4 and not found.within(allowed)
        assert difference(less, full, allowed).extra == found.missing
    # A line has no area, but overlaps with itself.
    line = detections(torch.tensor([0.9, 0.0]), torch.full((2, 4), 5.0), torch.tensor([0, 0]))
    assert difference(line, line, allowed).within(allowed)
