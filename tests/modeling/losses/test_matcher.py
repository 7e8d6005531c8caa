from itertools import permutations

import pytest
import torch
from dynamic_dino.modeling.losses import HungarianMatcher
from dynamic_dino.modeling.structures import Predictions, Target, TextFeatures


def match(matcher, layers, targets, text):
    """The pairs (image, query, target) of each layer."""
    stacked = Predictions(
        torch.stack([layer.logits for layer in layers]),
        torch.stack([layer.boxes for layer in layers]),
    )
    assignment = matcher(stacked, targets, text)
    layers = zip(assignment.image, assignment.query, assignment.target, strict=True)
    return [pairs(columns) for columns in layers]


def pairs(columns):
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_same_assignment_as_grounding_dino(draw):
    loss = pytest.importorskip("transformers.loss.loss_grounding_dino")
    text = draw.text(batch=3)
    for cost_class, cost_bbox, cost_giou in ((2, 5, 2), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        targets = draw.targets(4, 1, 6)
        layer = draw.predictions(text, queries=12)
        ours = match(HungarianMatcher(cost_class, cost_bbox, cost_giou), [layer], targets, text)[0]
        theirs = loss.GroundingDinoHungarianMatcher(cost_class, cost_bbox, cost_giou)(
            {
                "logits": layer.logits,
                "pred_boxes": layer.boxes,
                "label_maps": tuple((text.phrase_map > 0).float()),
            },
            [{"class_labels": t.labels, "boxes": t.boxes} for t in targets],
        )
        expected, offset = [], 0
        for image, (queries, objects) in enumerate(theirs):
            for query, target in zip(queries.tolist(), objects.tolist(), strict=True):
                expected.append((image, query, target + offset))
            offset += len(targets[image].labels)
        if cost_class and not cost_bbox:
            # Objects of the same phrase cost the same: compare what is paid, not who is who.
            costs = HungarianMatcher(cost_class, 0, 0)
            assert abs(paid(costs, layer, targets, text, ours)) == pytest.approx(
                abs(paid(costs, layer, targets, text, expected)), rel=1e-5
            )
        else:
            assert ours == expected


def paid(matcher, layer, targets, text, assigned):
    boxes = torch.cat([t.boxes for t in targets])
    labels = torch.cat([t.labels for t in targets])
    total = 0.0
    for image, query, target in assigned:
        phrase = text.phrase_map[image, labels[target]][None, None]
        one = Predictions(
            layer.logits[image, query][None, None], layer.boxes[image, query][None, None]
        )
        total += matcher._cost(one, boxes[target][None, None], phrase).item()
    return total


def test_no_other_assignment_costs_less(draw):
    text, targets = draw.text(1), draw.targets(3)
    layer = draw.predictions(text, queries=6)
    matcher = HungarianMatcher()
    [assigned] = match(matcher, [layer], targets, text)
    best = paid(matcher, layer, targets, text, assigned)
    for queries in permutations(range(6), 3):
        other = [(0, query, target) for target, query in enumerate(queries)]
        assert best <= paid(matcher, layer, targets, text, other) + 1e-4


def test_cost_by_hand():
    """One query, one object of two tokens, logit 0: positive .25 * .25 * ln 2, negative .75 ..."""
    text = TextFeatures(
        torch.zeros(1, 3, 4),
        torch.ones(1, 3, dtype=torch.bool),
        torch.zeros(1, 3).long(),
        torch.tensor([[[0.5, 0.5, 0.0]]]),
    )
    layer = Predictions(torch.zeros(1, 1, 3), torch.tensor([[[0.25, 0.25, 0.5, 0.5]]]))
    boxes = torch.tensor([[[0.75, 0.25, 0.5, 0.5]]])
    cost = HungarianMatcher()._cost(layer, boxes, text.phrase_map)
    class_cost = (0.25 - 0.75) * 0.25 * torch.log(torch.tensor(2.0))
    assert cost.item() == pytest.approx(2 * class_cost.item() + 5 * 0.5 - 2 * 0, rel=1e-5)


def test_layers_are_matched_each_on_its_own(draw):
    text, targets = draw.text(2), draw.targets(3, 2)
    layers = [draw.predictions(text, queries=9) for _ in range(3)]
    matcher = HungarianMatcher()
    together = match(matcher, layers, targets, text)
    assert len(together) == 3 and together[0] != together[1]
    for layer, assigned in zip(layers, together, strict=True):
        assert [assigned] == match(matcher, [layer], targets, text)


def test_every_object_has_one_query_and_no_query_two_objects(draw):
    text, targets = draw.text(4), draw.targets(0, 5, 1, 0)
    [assigned] = match(HungarianMatcher(), [draw.predictions(text, queries=5)], targets, text)
    image, query, target = zip(*assigned, strict=True)
    assert sorted(target) == list(range(6))
    assert image == (1,) * 5 + (2,)
    assert sorted(query[:5]) == list(range(5))


def test_more_objects_than_queries(draw):
    text, targets = draw.text(2), draw.targets(7, 2)
    [assigned] = match(HungarianMatcher(), [draw.predictions(text, queries=4)], targets, text)
    image, query, target = zip(*assigned, strict=True)
    assert image == (0,) * 4 + (1,) * 2
    assert len(set(target)) == 6
    assert sorted(target[4:]) == [7, 8]


def test_no_objects_at_all(draw):
    text = draw.text(2)
    layers = [draw.predictions(text, queries=4)] * 2
    assert match(HungarianMatcher(), layers, draw.targets(0, 0), text) == [[], []]


def test_a_cost_that_is_not_finite_is_reported(draw):
    text, targets = draw.text(3), draw.targets(0, 2, 1)
    layers = [draw.predictions(text, queries=4) for _ in range(2)]
    with torch.no_grad():
        layers[1].boxes[1, 2, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="image 1 of the batch .* layer 1"):
        match(HungarianMatcher(), layers, targets, text)
    with torch.no_grad():
        layers[1].boxes[1, 2, 0] = 0.5
        layers[0].logits[2, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="image 2 of the batch .* layer 0"):
        match(HungarianMatcher(), layers, targets, text)


def test_half_precision_predictions_are_matched_in_float32(draw):
    text, targets = draw.text(1), draw.targets(3)
    layer = draw.predictions(text, queries=8)
    half = Predictions(layer.logits.bfloat16(), layer.boxes.bfloat16())
    wide = Predictions(half.logits.float(), half.boxes.float())
    matcher = HungarianMatcher()
    with torch.autocast("cpu", torch.bfloat16):
        result = match(matcher, [half], targets, text)
    assert result == match(matcher, [wide], targets, text)


def test_all_costs_zero_is_an_error():
    with pytest.raises(ValueError, match="all 0"):
        HungarianMatcher(0, 0, 0)


def test_targets_may_have_other_phrases_per_image(draw):
    """The label counts in the prompt of its own image."""
    text = draw.text(2)
    labels = [torch.tensor([1]), torch.tensor([3])]
    layer = draw.predictions(text, queries=5)
    with torch.no_grad():
        layer.logits[:] = -5
        for image, query in ((0, 2), (1, 4)):
            layer.logits[image, query, text.phrase_map[image, labels[image][0]] > 0] = 5
    targets = [Target(draw.boxes(1), label) for label in labels]
    assert match(HungarianMatcher(1, 0, 0), [layer], targets, text) == [[(0, 2, 0), (1, 4, 1)]]
