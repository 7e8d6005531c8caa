"""Glyphs with arbitrary names."""

import json
from itertools import combinations

import numpy as np
import pytest
from dynamic_dino.data import datasets
from dynamic_dino.data.synthetic.glyphs import (
    COLORS,
    GLYPHS,
    SHAPES,
    categories,
    draw_image,
    vocabulary,
    write_glyphs,
)
from helpers.seeds import fresh_rng
from PIL import Image


def test_every_glyph_is_another():
    assert len(set(GLYPHS)) == len(GLYPHS) == len(SHAPES) * len(COLORS) * (len(COLORS) - 1)
    assert all(outer != inner for _, outer, inner in GLYPHS)
    for corners in SHAPES.values():
        assert np.min(corners) >= 0 and np.max(corners) <= 1


def test_names_are_words_that_say_nothing_of_the_glyph():
    words = vocabulary(len(GLYPHS))
    assert len(set(words)) == len(GLYPHS)
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words)
    found, glyphs, _ = categories(len(GLYPHS))
    assert [category["name"] for category in found] == words
    # neighbours in the list of names are no neighbours in looks: order is shuffled
    same_shape = np.mean([a[0] == b[0] for a, b in zip(glyphs, glyphs[1:], strict=False)])
    assert same_shape < 0.25


def test_frequencies_have_a_long_tail_and_three_tiers():
    found, _, share = categories(300)
    assert share.sum() == pytest.approx(1) and (np.diff(share) < 0).all()
    tiers = "".join(category["frequency"] for category in found)
    assert tiers == "f" * 100 + "c" * 100 + "r" * 100
    assert share[:100].sum() > 2.5 * share[200:].sum()


def test_objects_lie_in_the_picture_and_apart_and_are_where_their_boxes_say():
    rng = fresh_rng()
    picture, objects = draw_image(rng, 128, GLYPHS)
    pixels = np.asarray(picture)
    assert picture.size == (128, 128) and objects
    for label, (x, y, w, h) in objects:
        assert 0 <= x and 0 <= y and x + w <= 128 and y + h <= 128 and 25 <= w == h < 42
        _, outer, inner = GLYPHS[label]
        inside = pixels[y : y + h, x : x + w].reshape(-1, 3)
        for color in (outer, inner):
            exact = (inside == COLORS[color]).all(1)
            assert exact.mean() > 0.05
        disc = pixels[round(y + 0.55 * h), round(x + 0.5 * w)]
        assert tuple(disc) == COLORS[inner]
    for (_, (ax, ay, aw, ah)), (_, (bx, by, bw, bh)) in combinations(objects, 2):
        assert ax + aw <= bx or bx + bw <= ax or ay + ah <= by or by + bh <= ay


def test_a_split_is_read_as_a_data_set_and_made_again_alike(tmp_path):
    seed = int(fresh_rng().integers(1000))
    first = write_glyphs(tmp_path / "a", 40, 4, 96, "train", seed)
    again = write_glyphs(tmp_path / "b", 40, 4, 96, "train", seed)
    assert first.read_text() == again.read_text()
    pictures = [Image.open(path.parents[1] / "train/000003.png") for path in (first, again)]
    assert (np.asarray(pictures[0]) == np.asarray(pictures[1])).all()
    other = write_glyphs(tmp_path / "c", 40, 4, 96, "train", seed + 1)
    assert first.read_text() != other.read_text()
    names = [c["name"] for c in json.loads(first.read_text())["categories"]]
    assert names == [c["name"] for c in json.loads(other.read_text())["categories"]]
    same, renamed = (
        json.loads((first.parent / f"{p}train.json").read_text()) for p in ("", "described_")
    )
    texts = [c.pop("name") for c in renamed["categories"]]
    assert not set(texts) & set(names) and len(set(texts)) == 40
    assert [c.pop("name") for c in same["categories"]] == names and same == renamed
    datasets.register_coco_json("test_glyphs", first, first.parents[1] / "train")
    assert len(datasets.load_datasets("test_glyphs")) == 4
    assert datasets.get_metadata("test_glyphs").thing_classes == names
    assert set(datasets.get_metadata("test_glyphs").frequency) == {"r", "c", "f"}


@pytest.mark.parametrize("count", [0, len(GLYPHS) + 1])
def test_a_number_of_names_that_there_are_no_glyphs_for(count):
    with pytest.raises(ValueError, match=f"{count} names were asked for; there are 1 to"):
        categories(count)
