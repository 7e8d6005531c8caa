import torch
import torchvision.ops as ops
from dynamic_dino.modeling.losses import (
    box_iou,
    cxcywh_to_xyxy,
    generalized_box_iou,
    xyxy_to_cxcywh,
)


def test_formats_match_torchvision_and_invert_each_other(draw):
    boxes = draw.boxes(4, 7)
    corners = cxcywh_to_xyxy(boxes)
    torch.testing.assert_close(corners, ops.box_convert(boxes, "cxcywh", "xyxy"))
    torch.testing.assert_close(xyxy_to_cxcywh(corners), boxes)


def test_overlaps_match_torchvision_as_pairs_and_as_all_pairs(draw):
    a, b = cxcywh_to_xyxy(draw.boxes(11)), cxcywh_to_xyxy(draw.boxes(6))
    torch.testing.assert_close(box_iou(a[:, None], b), ops.box_iou(a, b))
    torch.testing.assert_close(generalized_box_iou(a[:, None], b), ops.generalized_box_iou(a, b))
    loss = ops.generalized_box_iou_loss(a[:6], b, reduction="none")
    torch.testing.assert_close(1 - generalized_box_iou(a[:6], b), loss, rtol=1e-4, atol=1e-4)


def test_batches_of_all_pairs_are_one_call(draw):
    a, b = cxcywh_to_xyxy(draw.boxes(3, 5)), cxcywh_to_xyxy(draw.boxes(3, 4))
    together = generalized_box_iou(a[:, :, None], b[:, None])
    for image in range(3):
        torch.testing.assert_close(together[image], ops.generalized_box_iou(a[image], b[image]))


def test_known_overlaps():
    square = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert generalized_box_iou(square, square) == 1
    # Half overlaps: 1/3. Apart: hull of 1 x 3, union 2.
    assert abs(box_iou(square, square + torch.tensor([0.5, 0, 0.5, 0])) - 1 / 3) < 1e-6
    apart = square + torch.tensor([2.0, 0, 2.0, 0])
    assert box_iou(square, apart) == 0
    assert abs(generalized_box_iou(square, apart) + 1 / 3) < 1e-6


def test_boxes_without_area_have_finite_overlaps_and_gradients():
    points = torch.full((2, 4), 0.5, requires_grad=True)
    value = generalized_box_iou(points, points.detach())
    value.sum().backward()
    assert value.isfinite().all() and points.grad.isfinite().all()
