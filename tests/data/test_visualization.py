"""Pictures: right pixels change, labels stay inside and apart, odd sizes work."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from dynamic_dino.data import visualization
from dynamic_dino.data.visualization import PALETTE, contact_sheet, draw_detections, phrase_colors
from dynamic_dino.serving.inference import Phrases
from helpers.seeds import fresh_rng


def detections(size, boxes, phrases, scores=None):
    scores = torch.linspace(0.9, 0.4, len(boxes)) if scores is None else torch.tensor(scores)
    return Instances(
        size,
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        scores=scores,
        phrases=Phrases(phrases),
    )


@pytest.fixture
def tags(monkeypatch):
    """The label rectangles and texts that were drawn."""
    drawn = []
    original = visualization._draw_tag

    def record(pen, tag, text, color, font):
        drawn.append((tag, text))
        original(pen, tag, text, color, font)

    monkeypatch.setattr(visualization, "_draw_tag", record)
    return drawn


def test_lines_run_along_the_box_and_nothing_else_changes():
    image = np.full((480, 640, 3), 128, np.uint8)
    found = detections((480, 640), [[100, 120, 300, 400]], ["red panda"])
    picture = draw_detections(image, found)
    assert picture.shape == image.shape and picture.dtype == np.uint8
    color = phrase_colors(["red panda"])["red panda"]
    for x, y in [(200, 399), (100, 260), (299, 260), (280, 120)]:
        near = picture[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3)
        assert (near == color).all(1).any(), (x, y)
    assert (picture[150:380, 120:280] == 128).all(), "the object itself is left as it is"
    assert (picture[:, 310:] == 128).all() and (picture[410:] == 128).all()
    assert (image == 128).all(), "the argument was modified"


def test_boxes_are_scaled_with_a_small_image():
    image = np.full((60, 80, 3), 128, np.uint8)
    picture = draw_detections(image, detections((60, 80), [[20, 30, 60, 50]], ["mug"]))
    assert picture.shape == (480, 640, 3)
    color = phrase_colors(["mug"])["mug"]
    rows, columns = np.nonzero((picture == color).all(2))
    assert abs(rows.max() - 50 * 8) <= 2 and abs(columns.max() - 60 * 8) <= 2
    unscaled = draw_detections(image, detections((60, 80), [], []), min_size=0)
    assert (unscaled == image).all()


def test_threshold():
    image = np.zeros((640, 640, 3), np.uint8)
    found = detections((640, 640), [[10, 10, 600, 600]], ["mug"], scores=[0.5])
    assert (draw_detections(image, found, threshold=0.51) == 0).all()
    assert (draw_detections(image, found, threshold=0.5) != 0).any()


def test_labels_stay_inside_and_do_not_overlap(tags):
    """A dozen objects at the borders and across each other, with room for all labels."""
    rng = fresh_rng()
    boxes = []
    for _ in range(12):
        x, y = rng.uniform(-20, 1100), rng.uniform(-20, 800)
        boxes.append([x, y, x + rng.uniform(5, 600), y + rng.uniform(5, 500)])
    boxes[3:5] = [[0, 0, 1280, 960], [0, 0, 1280, 960]]
    phrases = [f"thing number {i}" for i in range(12)]
    draw_detections(np.zeros((960, 1280, 3), np.uint8), detections((960, 1280), boxes, phrases))
    assert sorted(text[:-5] for _, text in tags) == sorted(phrases)
    for i, ((x0, y0, x1, y1), _) in enumerate(tags):
        assert 0 <= x0 < x1 <= 1280 and 0 <= y0 < y1 <= 960
        for (u0, v0, u1, v1), _ in tags[:i]:
            overlap = min(x1, u1) > max(x0, u0) and min(y1, v1) > max(y0, v0)
            assert not overlap


def test_long_phrases_are_cut_but_keep_their_score(tags):
    image = np.zeros((300, 200, 3), np.uint8)
    found = detections((300, 200), [[0, 0, 50, 50]], ["very " * 40 + "long"], scores=[0.77])
    draw_detections(image, found)
    (tag, text), *_ = tags
    assert text.startswith("very") and text.endswith("… 0.77")
    assert tag[0] >= 0 and tag[2] <= draw_detections(image, found).shape[1]


@pytest.mark.parametrize("size", [(1, 1), (3, 700), (700, 3), (16, 16), (1500, 2000)])
def test_odd_sizes_and_boxes(size):
    h, w = size
    boxes = [[0, 0, w, h], [w - 1, h - 1, w, h], [-50, -50, w + 50, h + 50], [w, h, w, h]]
    for min_size in (0, 640):
        picture = draw_detections(
            np.zeros((h, w, 3), np.uint8),
            detections(size, boxes, ["a", "b", "c", "日本"]),
            min_size=min_size,
        )
        assert max(picture.shape[:2]) == max(h, w, min_size)


def test_colours_are_stable_and_distinct():
    names = [f"object {i}" for i in fresh_rng().integers(0, 10**6, len(PALETTE))]
    colors = phrase_colors(names)
    assert len(set(colors.values())) == len(set(names))
    assert colors == phrase_colors(list(reversed(names)))
    alone = phrase_colors(names[:1])[names[0]]
    assert alone == phrase_colors([names[0].upper()])[names[0].upper()]
    assert len(phrase_colors([f"{i}" for i in range(50)])) == 50  # more than there are colours


def test_contact_sheet():
    rng = fresh_rng()
    images = [
        np.broadcast_to(np.uint8([40 * i + 20, 0, 90]), (*rng.integers(50, 900, 2), 3))
        for i in range(5)
    ]
    captions = ["", "a mug", "a caption that is far too long for its picture " * 9, "b", "c"]
    sheet = contact_sheet(images, columns=2, captions=captions, width=900)
    assert sheet.shape[1] == 900
    for image in images:
        rows, columns = np.nonzero((sheet == image[0, 0]).all(2))
        h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert abs(w / h * image.shape[0] / image.shape[1] - 1) < 0.2, "aspect ratio"
        block = sheet[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (block == image[0, 0]).all()
    assert (sheet[:, -2:] == 255).all(), "something runs over the border"


def test_contact_sheet_refuses_nonsense():
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([])
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        contact_sheet([image, image], captions=["a"])


def test_boxes_of_any_size_and_place_can_be_drawn():
    rng = fresh_rng()
    image = np.zeros((90, 120, 3), dtype=np.uint8)
    for width in [0.2, *rng.uniform(0, 30, 60)]:
        for height in (0.3, float(rng.uniform(0, 30)), 80.0):
            x, y = rng.uniform(-5, 121), rng.uniform(-5, 91)
            picture = visualization.draw_boxes(image, [[x, y, x + width, y + height]], ["harp"])
            assert picture.shape == (480, 640, 3) and picture.any()
