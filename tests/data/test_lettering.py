"""Labels in any script: letters of a font, or something legible, never the box of a missing one."""

import numpy as np
import pytest
from dynamic_dino.data import lettering
from dynamic_dino.data.lettering import LabelFont, legible
from dynamic_dino.data.visualization import draw_boxes
from helpers.seeds import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw


def drawable(letter: str) -> bool:
    return ord(letter) in lettering._in_dejavu() or lettering._in_opencv(letter)


@settings(max_examples=examples(60), deadline=None)
@given(st.text(max_size=9))
def test_every_letter_of_a_label_is_in_a_font(text):
    shown = legible(text)
    assert all(map(drawable, shown)) and shown.isprintable() and legible(shown) == shown
    mask = LabelFont(17).getmask(text)
    assert abs(mask.width - LabelFont(17).getlength(text)) <= 1
    visible = any(letter.isalnum() for letter in shown)
    assert not visible or mask.getbbox()


@settings(max_examples=examples(25), deadline=None)
@given(st.text(st.characters(max_codepoint=0x9FFF, min_codepoint=0x4E00), min_size=2, max_size=2))
def test_letters_are_told_apart(pair):
    a, b = (np.asarray(LabelFont(24).getmask(letter)) for letter in pair)
    assert np.array_equal(a, b) == (pair[0] == pair[1])


def test_scripts():
    kept = "пёс كلب אבג ελληνικά ქართული perch", "鲈鱼", "ペンギン", "고양이"
    assert [legible(text) for text in kept] == list(kept)
    assert legible("हाथी") == "hathi" and legible("🐼") == ":panda_face:"
    assert legible("red\n\tpanda ") == "red panda" and legible("\ue000\x00") == "U+E000U+0000"


def test_without_the_font_of_opencv_5(monkeypatch):
    monkeypatch.setattr(lettering, "_opencv_font", lambda: None)
    lettering._legible.cache_clear()
    try:
        assert legible("鲈鱼") == "LuYu"
    finally:
        lettering._legible.cache_clear()


@pytest.mark.parametrize("text", ["perch", "鲈鱼 perch"])
def test_labels_are_drawn_where_they_were_measured(text):
    font, canvas = LabelFont(20), Image.new("RGB", (200, 60))
    font.draw(ImageDraw.Draw(canvas, "RGBA"), (100, 30), text, (255, 255, 255, 255))
    left, top, right, bottom = canvas.getbbox()
    assert right - left <= font.getlength(text) + 2 and bottom - top <= 26
    assert abs((left + right) / 2 - 100) <= 4
    image = np.zeros((90, 120, 3), np.uint8)
    labels = [draw_boxes(image, [[20, 20, 90, 70]], [name]) for name in (text, f"{text}鳜")]
    assert (labels[0] != labels[1]).any()
