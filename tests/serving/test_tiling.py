"""Large images in tiles: every thing is found once, in its place, whatever its size."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from dynamic_dino import load_detector
from dynamic_dino.data.images import load_image
from dynamic_dino.serving.inference import Detector
from dynamic_dino.serving.tiling import TiledDetector, detect_tiled, tiles
from helpers.seeds import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

NAMES = ["cow", "horse"]
TILE, OVERLAP = 64, 0.25
SEEN = 0.045  # of the image's longest side: what the model below finds; 3 pixels of a tile
CELL = 80


class Blobs(torch.nn.Module):
    """Finds what is of one shade of gray, even ones as "cow", odd ones as "horse", if it is large
    enough for the image."""

    def forward(self, batch):
        return [{"instances": self.look(s["image"][0], s["prompt"].phrases)} for s in batch]

    def look(self, image, phrases):
        boxes, classes = [torch.zeros(0, 4)], []
        for shade in image.unique().tolist()[1:]:
            ys, xs = torch.nonzero(image == shade, as_tuple=True)
            box = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            if min(box[2:] - box[:2]) >= SEEN * max(image.shape):
                boxes.append(box[None].float())
                classes.append(shade % 2)
        found = Instances(tuple(image.shape))
        found.pred_boxes = Boxes(torch.cat(boxes))
        found.scores = torch.full((len(classes),), 0.5)
        found.pred_classes = torch.tensor(classes, dtype=torch.int64)
        found.phrases = [phrases[c] for c in classes]
        return found


@settings(max_examples=examples(8), deadline=None)
@given(st.data(), st.integers(0, 70), st.integers(0, 70))
def test_everything_is_found_once(data, right, bottom):
    """Things of 3 to 70 pixels, each in a cell of its own, wherever the borders of tiles run. The
    whole image shows those of 14 pixels or more; tiles show small ones, and cut large ones."""
    image = np.zeros((3 * CELL + bottom, 3 * CELL + right, 3), np.uint8)
    image[:, :, 1] = 1  # what is nowhere: the shade 0
    wanted = []
    for i in range(9):
        w, h = (data.draw(st.integers(3, 70)) for _ in range(2))
        if max(w, h) > TILE * OVERLAP:  # else it may be long and thin: whole nowhere
            w, h = max(w, 15), max(h, 15)
        x, y = (
            CELL * c + data.draw(st.integers(0, CELL - s)) for c, s in ((i % 3, w), (i // 3, h))
        )
        image[y : y + h, x : x + w, 0] = 10 + i
        wanted.append((NAMES[i % 2], x, y, x + w, y + h))
    detector = Detector(Blobs(), None, batch_size=4)
    found = detect_tiled(detector, image, NAMES, TILE, OVERLAP)
    boxes = found.pred_boxes.tensor.tolist()
    assert sorted((p, *b) for p, b in zip(found.phrases, boxes, strict=True)) == sorted(wanted)
    assert found.image_size == image.shape[:2]
    assert [NAMES[c] for c in found.pred_classes] == list(found.phrases)


@given(st.integers(1, 900), st.integers(1, 900), st.integers(32, 300), st.floats(0, 0.9))
@settings(max_examples=examples(30), deadline=None)
def test_tiles_cover_the_image(width, height, tile, overlap):
    places = tiles(width, height, tile, overlap)
    for side, first in ((width, 0), (height, 1)):
        spans = sorted({(p[first], p[first + 2]) for p in places})
        assert spans[0][0] == 0 and spans[-1][1] == side
        assert all(end - start == min(tile, side) for start, end in spans)
        for (_, end), (start, _) in zip(spans, spans[1:], strict=False):
            assert end - start >= int(tile * overlap)


def test_it_is_called_as_a_detector_is():
    image = np.zeros((40, 200, 3), np.uint8)
    image[5:9, 5:9, 0] = image[5:15, 50:70, 0] = 10  # of one shade: one box in the whole image
    detector = TiledDetector(Detector(Blobs(), None, threshold=0.4), 64, 0)
    assert detector.threshold == 0.4 and detector.device == torch.device("cpu")
    first, second, third = detector([image, image, image[:, :60]], [["a"], ["b"], ["c"]])
    assert [*first.phrases] == ["a"] * len(first) and [*second.phrases] == ["b"] * len(second)
    assert len(third) == 1, "no larger than a tile: as it is"
    assert len(detector(image, "a. b.", max_detections=1)) == 1
    assert len(detector(image, "a. b.", threshold=0.6)) == 0
    with pytest.raises(ValueError, match="tile 8 must be a whole number of pixels, 32 or more"):
        TiledDetector(detector, 8)
    with pytest.raises(ValueError, match="overlap 1 of tiles is not between 0 and 0.9"):
        TiledDetector(detector, 64, 1)
    with pytest.raises(ValueError, match="only a closed-set detector"):
        detector(image)


STAMPS = Path(__file__).parents[2] / "datasets/stamps"
TOOLS = ("hammer", "measuring tape", "scissors")


@pytest.mark.slow
@pytest.mark.skipif(not STAMPS.is_dir(), reason="needs Stamps: make demo, or its first step")
def test_small_photos_on_a_large_page():
    """nano-x16 finds the tools of real photos where these are a small part of a large image."""
    whole, tiled = tools_found_on_a_page(STAMPS)
    assert whole <= 1 and tiled >= 5


def tools_found_on_a_page(stamps):
    """How many of nine photos of tools, 200 pixels on a page of 1500 x 1500, show their tool: in
    the page as a whole, and in its tiles too."""
    truth = json.loads((stamps / "annotations/val_real.json").read_text())
    names = {c["id"]: c["name"] for c in truth["categories"]}
    files = {image["id"]: image["file_name"] for image in truth["images"]}
    chosen = [
        annotation
        for tool in TOOLS
        for annotation in [a for a in truth["annotations"] if names[a["category_id"]] == tool][:3]
    ]
    page, boxes = Image.new("RGB", (1500, 1500), (110, 120, 100)), []
    for i, annotation in enumerate(chosen):
        photo = Image.fromarray(load_image(stamps / "val_real" / files[annotation["image_id"]]))
        scale = 200 / max(photo.size)
        x, y = 60 + 500 * (i % 3), 100 + 500 * (i // 3)
        page.paste(photo.resize([round(side * scale) for side in photo.size]), (x, y))
        left, top, w, h = (v * scale for v in annotation["bbox"])
        boxes.append([x + left, y + top, x + left + w, y + top + h])
    detector = load_detector("nano-x16", device="cpu")
    hits = []
    for look in (detector, TiledDetector(detector, 400, 0.5)):
        found = look(page, TOOLS)
        fits = pairwise_iou(Boxes(torch.tensor(boxes)), found.pred_boxes) > 0.5
        tools = torch.tensor([TOOLS.index(names[a["category_id"]]) for a in chosen])
        hits.append(int((fits & (tools[:, None] == found.pred_classes)).any(1).sum()))
    return hits
