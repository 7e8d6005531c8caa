"""The hand-drawn boxes of the stamps set's real photos: is the committed JSON well formed?"""

import json
import re
from collections import Counter, defaultdict
from importlib.resources import files

import pytest


@pytest.fixture(scope="module")
def document() -> dict:
    file = files("dynamic_dino.data.synthetic.stamps").joinpath("val_real.json")
    return json.loads(file.read_text("utf-8"))


def test_enough_photos_with_boxes(document):
    images = document["images"]
    assert len(images) >= 60
    annotated = {annotation["image_id"] for annotation in document["annotations"]}
    assert annotated == {image["id"] for image in images}


@pytest.mark.parametrize("table", ["images", "annotations", "categories"])
def test_ids_are_unique(document, table):
    ids = [entry["id"] for entry in document[table]]
    assert len(ids) == len(set(ids))


def test_photos_can_be_found_in_the_package(document):
    names = [image["file_name"] for image in document["images"]]
    assert len(names) == len(set(names))
    for image in document["images"]:
        match = re.fullmatch(r"([a-z_]+)/([A-Za-z0-9_]+\.webp)", image["file_name"])
        assert match, image["file_name"]
        resource, entry = image["source"].split(":")
        assert resource.endswith(f"/{match[1]}.rcc") and entry.endswith(f"/{match[2]}")
        assert image["licence"] and image["author"]


def test_boxes_are_inside_their_photo(document):
    images = {image["id"]: image for image in document["images"]}
    for annotation in document["annotations"]:
        image = images[annotation["image_id"]]
        x, y, width, height = annotation["bbox"]
        assert x >= 0 and y >= 0 and width >= 4 and height >= 4, annotation
        assert x + width <= image["width"] + 1e-6, annotation
        assert y + height <= image["height"] + 1e-6, annotation
        assert annotation["area"] == pytest.approx(width * height, abs=0.06)
        assert annotation["iscrowd"] in (0, 1)


def test_no_object_is_boxed_twice(document):
    boxes = defaultdict(list)
    for annotation in document["annotations"]:
        boxes[annotation["image_id"], annotation["category_id"]].append(annotation["bbox"])
    for (image, _), group in boxes.items():
        for i, (ax, ay, aw, ah) in enumerate(group):
            for bx, by, bw, bh in group[:i]:
                width = max(0, min(ax + aw, bx + bw) - max(ax, bx))
                height = max(0, min(ay + ah, by + bh) - max(ay, by))
                shared = width * height
                assert shared < 0.7 * (aw * ah + bw * bh - shared), f"image {image}"


def test_every_category_is_named_and_used(document):
    names = [category["name"] for category in document["categories"]]
    assert len(names) == len(set(names))
    for name in names:
        assert re.fullmatch(r"[a-z]+( [a-z]+)*", name), name
    for category in document["categories"]:
        assert isinstance(category["in_tuxpaint"], bool)
        assert category["name"] not in category["near"]
    used = {annotation["category_id"] for annotation in document["annotations"]}
    assert used == {category["id"] for category in document["categories"]}


def test_no_name_dominates_and_both_kinds_are_there(document):
    seen = {category["id"] for category in document["categories"] if category["in_tuxpaint"]}
    pairs = {(a["image_id"], a["category_id"]) for a in document["annotations"]}
    assert max(Counter(category for _, category in pairs).values()) <= 6
    photos_of_seen = {image for image, category in pairs if category in seen}
    assert len(photos_of_seen) >= 35
    assert len(document["images"]) - len(photos_of_seen) >= 25
