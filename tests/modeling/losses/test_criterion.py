import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from dynamic_dino.modeling.losses import (
    Criterion,
    HungarianMatcher,
    cxcywh_to_xyxy,
    generalized_box_iou,
)
from dynamic_dino.modeling.losses.criterion import mean_objects
from dynamic_dino.modeling.structures import (
    DenoisingQueries,
    DetectorOutput,
    Predictions,
    Target,
    TextFeatures,
)

BASE = ("loss_class", "loss_bbox", "loss_giou")


def detector_output(draw, batch=2, queries=11, layers=3, **more):
    text = draw.text(batch)
    return DetectorOutput(
        layers=[draw.predictions(text, queries) for _ in range(layers)],
        selection=draw.predictions(text, queries),
        text=text,
        **more,
    )


def leaves(output):
    predictions = [*output.layers, output.selection, *output.denoising_layers]
    return [tensor for p in predictions for tensor in (p.logits, p.boxes)]


def with_denoising(draw, output, targets, layers=3):
    """Two groups of (positives, negatives), the last slots of short images invalid."""
    size, groups = max(len(t.labels) for t in targets), 2
    slots = 2 * size * groups
    index = torch.arange(size).repeat(2 * groups)
    counts = torch.tensor([len(t.labels) for t in targets])
    valid = index < counts[:, None]
    negative = (torch.arange(slots) // max(size, 1)) % 2 == 1
    output.denoising = DenoisingQueries(
        content=torch.zeros(len(targets), slots, 4),
        boxes=draw.boxes(len(targets), slots),
        attention_mask=torch.zeros(1),
        target_index=torch.where(valid & ~negative, index, -1),
        valid=valid,
        groups=groups,
    )
    output.denoising_layers = [draw.predictions(output.text, slots) for _ in range(layers)]
    return output


def focal(logit, wanted, alpha=0.25):
    p = 1 / (1 + math.exp(-logit))
    return -alpha * (1 - p) ** 2 * math.log(p) if wanted else -(1 - alpha) * p**2 * math.log(1 - p)


def test_matches_grounding_dino(draw):
    loss = pytest.importorskip("transformers.loss.loss_grounding_dino")
    output, targets = detector_output(draw), draw.targets(4, 3)
    ours = Criterion(HungarianMatcher())(output, targets)

    text = output.text
    theirs = loss.GroundingDinoImageLoss(
        loss.GroundingDinoHungarianMatcher(2, 5, 2), 0.25, ["labels", "boxes"]
    )
    for suffix, layer in {
        "": output.layers[-1],
        "_0": output.layers[0],
        "_1": output.layers[1],
        "_selection": output.selection,
    }.items():
        expected = theirs(
            {
                "logits": layer.logits,
                "pred_boxes": layer.boxes,
                "label_maps": tuple((text.phrase_map > 0).float()),
                "text_mask": text.mask[:, None].expand_as(layer.logits),
            },
            [{"class_labels": t.labels, "boxes": t.boxes} for t in targets],
        )
        for name, other, weight in zip(
            BASE, ("loss_ce", "loss_bbox", "loss_giou"), (2, 5, 2), strict=True
        ):
            torch.testing.assert_close(ours[name + suffix], weight * expected[other])


def test_by_hand():
    """One object of a two-token phrase, two queries, one padding token."""
    text = TextFeatures(
        tokens=torch.zeros(1, 4, 2),
        mask=torch.tensor([[True, True, True, False]]),
        blocks=torch.zeros(1, 4).long(),
        phrase_map=torch.tensor([[[0.5, 0.5, 0, 0], [0, 0, 1.0, 0]]]),
    )
    logits = torch.tensor([[[1.0, 0.5, -2.0, -math.inf], [-1.0, -3.0, 0.2, 9.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1]]])
    layer = Predictions(logits, boxes)
    target = Target(torch.tensor([[0.5, 0.5, 0.4, 0.2]]), torch.tensor([0]))
    losses = Criterion(HungarianMatcher(), 3.0, 7.0, 11.0)(
        DetectorOutput([layer], layer, text), [target]
    )
    expected = sum(focal(v, w) for v, w in ((1.0, True), (0.5, True), (-2.0, False)))
    expected += sum(focal(v, False) for v in (-1.0, -3.0, 0.2))
    for suffix in ("", "_selection"):
        assert losses["loss_class" + suffix].item() == pytest.approx(3 * expected, rel=1e-5)
        assert losses["loss_bbox" + suffix].item() == pytest.approx(7 * 0.2, rel=1e-5)
        assert losses["loss_giou" + suffix].item() == pytest.approx(11 * 0.5, rel=1e-5)


def test_names_do_not_depend_on_the_targets(draw):
    names = {name + suffix for name in BASE for suffix in ("", "_0", "_1", "_selection")}
    names_dn = {name + suffix for name in BASE for suffix in ("_dn", "_dn_0", "_dn_1")}
    for counts in ((2, 3), (0, 1), (0, 0)):
        targets = draw.targets(*counts)
        output = detector_output(draw)
        assert set(Criterion(HungarianMatcher())(output, targets)) == names
        with_denoising(draw, output, targets)
        assert set(Criterion(HungarianMatcher())(output, targets)) == names | names_dn


def test_loss_and_gradients_are_finite_with_padding_tokens_and_without_objects(draw):
    for counts in ((2, 0), (0, 0), (15, 1)):
        targets = draw.targets(*counts)
        output = with_denoising(draw, detector_output(draw), targets)
        losses = Criterion(HungarianMatcher())(output, targets)
        assert all(loss.isfinite() and loss.shape == () for loss in losses.values())
        sum(losses.values()).backward()
        padding = ~output.text.mask.unsqueeze(1)
        for tensor in leaves(output):
            assert tensor.grad is not None and tensor.grad.isfinite().all()
            if tensor.shape[-1] != 4:
                assert (tensor.grad.masked_select(padding) == 0).all()


def test_without_objects_everything_is_background(draw):
    output = detector_output(draw)
    losses = Criterion(HungarianMatcher())(output, draw.targets(0, 0))
    assert losses["loss_bbox"] == losses["loss_giou"] == 0
    valid = output.layers[-1].logits[output.text.mask[:, None].expand(-1, 11, -1)]
    expected = 2 * sum(focal(v, False) for v in valid.tolist())
    assert losses["loss_class"].item() == pytest.approx(expected, rel=1e-4)


def test_perfect_boxes_cost_nothing(draw):
    text, targets = draw.text(2), draw.targets(3, 3)
    boxes = torch.stack([t.boxes for t in targets])[:, torch.randperm(3)]
    logits = torch.zeros(2, 3, draw.tokens)
    losses = Criterion(HungarianMatcher())(
        DetectorOutput([Predictions(logits, boxes)], Predictions(logits, boxes), text), targets
    )
    assert losses["loss_bbox"] < 1e-6 and losses["loss_giou"] < 1e-4


def test_denoising_losses_by_hand(draw):
    targets = draw.targets(3, 1)
    output = with_denoising(draw, detector_output(draw), targets)
    losses = Criterion(HungarianMatcher())(output, targets)
    dn, text = output.denoising, output.text
    for suffix, layer in {
        "_dn_0": output.denoising_layers[0],
        "_dn_1": output.denoising_layers[1],
        "_dn": output.denoising_layers[2],
    }.items():
        terms = dict.fromkeys(BASE, 0.0)
        for image, slot in torch.nonzero(dn.valid).tolist():
            index = int(dn.target_index[image, slot])
            wanted = torch.zeros(draw.tokens)
            if index >= 0:
                box, true_box = layer.boxes[image, slot], targets[image].boxes[index]
                wanted = text.phrase_map[image, targets[image].labels[index]]
                terms["loss_bbox"] += 5 * (box - true_box).abs().sum().item() / 8
                giou = generalized_box_iou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(true_box))
                terms["loss_giou"] += 2 * (1 - giou.item()) / 8
            for token in torch.nonzero(text.mask[image]).flatten().tolist():
                logit = layer.logits[image, slot, token].item()
                terms["loss_class"] += 2 * focal(logit, bool(wanted[token])) / 8
        for name, expected in terms.items():
            assert losses[name + suffix].item() == pytest.approx(expected, rel=1e-4)


def test_invalid_denoising_slots_get_no_gradient(draw):
    targets = draw.targets(3, 1)
    output = with_denoising(draw, detector_output(draw), targets)
    sum(Criterion(HungarianMatcher())(output, targets).values()).backward()
    for layer in output.denoising_layers:
        assert (layer.logits.grad[~output.denoising.valid] == 0).all()
        assert (layer.boxes.grad[output.denoising.target_index < 0] == 0).all()
        assert (layer.boxes.grad[output.denoising.target_index >= 0] != 0).any(-1).all()


def test_each_layer_feeds_its_own_losses_only(draw):
    output, targets = detector_output(draw), draw.targets(2, 2)
    losses = Criterion(HungarianMatcher())(output, targets)
    losses["loss_class_1"].backward()
    touched = [(p.logits.grad != 0).any().item() for p in (*output.layers, output.selection)]
    assert touched == [False, True, False, False]


def test_losses_are_float32_whatever_autocast_says(draw):
    output, targets = detector_output(draw), draw.targets(2, 3)
    criterion = Criterion(HungarianMatcher())
    expected = criterion(output, targets)
    with torch.autocast("cpu", torch.bfloat16):
        result = criterion(output, targets)
    for name, loss in expected.items():
        assert result[name].dtype == torch.float32 and torch.equal(result[name], loss)

    for p in (*output.layers, output.selection):
        p.logits, p.boxes = p.logits.detach().half(), p.boxes.detach().half()
    assert all(loss.dtype == torch.float32 for loss in criterion(output, targets).values())


def test_router_losses_join_under_their_own_names(draw):
    class Sum:
        name = "loss_sum"

        def __call__(self, routings):
            return sum(routing.probs.sum() for routing in routings)

    routings = [SimpleNamespace(probs=torch.rand(4, 2)) for _ in range(2)]
    output = detector_output(draw, routings=routings)
    criterion = Criterion(HungarianMatcher(), router_losses=[Sum()])
    losses = criterion(output, draw.targets(1, 1))
    torch.testing.assert_close(
        losses["loss_sum"], routings[0].probs.sum() + routings[1].probs.sum()
    )
    output.routings = []
    assert "loss_sum" not in criterion(output, draw.targets(1, 1))


def test_number_of_objects_is_averaged_over_ranks(draw, monkeypatch):
    output, targets = detector_output(draw), draw.targets(2, 2)
    alone = Criterion(HungarianMatcher())(output, targets)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(12))  # the other rank's
    together = Criterion(HungarianMatcher())(output, targets)
    for name, loss in alone.items():
        torch.testing.assert_close(together[name], loss * 4 / 8)


def test_losses_of_micro_batches_add_up_to_those_of_the_batch(draw):
    output, targets = detector_output(draw, batch=4), draw.targets(3, 0, 1, 4)

    def part(start: int) -> DetectorOutput:
        def cut(value):
            names = ("logits", "boxes") if isinstance(value, Predictions) else vars(text)
            return type(value)(*(getattr(value, name)[start : start + 2] for name in names))

        text = output.text
        return DetectorOutput([cut(x) for x in output.layers], cut(output.selection), cut(text))

    criterion = Criterion(HungarianMatcher())
    whole = criterion(output, targets)
    objects = mean_objects([3, 5], torch.device("cpu"))
    first, second = (criterion(part(i), targets[i : i + 2], objects) for i in (0, 2))
    for name, loss in whole.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, loss)


def test_wrong_number_of_targets(draw):
    with pytest.raises(ValueError, match="targets are 3, but the batch has 2"):
        Criterion(HungarianMatcher())(detector_output(draw), draw.targets(1, 1, 1))
