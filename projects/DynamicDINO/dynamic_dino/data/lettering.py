"""`LabelFont`: labels in pictures in any script, none of which becomes empty boxes.

Letters are those of DejaVu, which matplotlib brings (Latin, Greek, Cyrillic, Arabic, Hebrew, ...);
Chinese, Japanese and Korean ones of the font in OpenCV 5; what neither has, is written in Latin
letters by anyascii ("हाथी": "hathi", a panda's face: ":panda_face:"), or by its code, "U+1F9A4".
A font of all scripts as a dependency of its own would be tens of megabytes.
"""

from __future__ import annotations

import math
import unicodedata
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from anyascii import anyascii
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

DEJAVU = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf"))
WIDE = 0.9  # size of OpenCV's letters, which fill their square, to that of the others

Ink = tuple[int, ...]


class LabelFont:
    """A font of one size for text in one line; blanks and line breaks become single blanks.

    Args:
        size: of the letters, in pixels.
    """

    def __init__(self, size: int) -> None:
        self.latin = ImageFont.truetype(DEJAVU, size)
        self.wide = max(round(WIDE * size), 1)
        self.ascent, self.descent = self.latin.getmetrics()

    def getlength(self, text: str) -> float:
        """The width of the text in pixels."""
        return sum(self._length(run, wide) for run, wide in _runs(text))

    def getmask(self, text: str) -> Image.Image:
        """Mode "L", 255 where the ink is: ascent + descent high, as wide as the text."""
        height = self.ascent + self.descent
        mask = Image.new("L", (max(math.ceil(self.getlength(text)), 1), height))
        x = 0.0
        for run, wide in _runs(text):
            if wide:
                pixels = np.zeros((height, mask.width + 2 * height), np.uint8)  # it breaks lines
                cv2.putText(pixels, run, (0, self.ascent), 255, _opencv_font(), self.wide)
                mask.paste(255, (round(x), 0), Image.fromarray(pixels))
            else:
                ImageDraw.Draw(mask).text((x, self.ascent), run, 255, self.latin, anchor="ls")
            x += self._length(run, wide)
        return mask

    def draw(self, pen: ImageDraw.ImageDraw, middle: tuple[float, float], text: str, ink: Ink):
        """Draws the text around the point `middle`."""
        runs = _runs(text)
        if not any(wide for _, wide in runs):  # placed between pixels, too
            pen.text(middle, "".join(run for run, _ in runs), ink, self.latin, anchor="mm")
            return
        mask = self.getmask(text)
        corner = (round(middle[0] - mask.width / 2), round(middle[1] - mask.height / 2))
        pen.bitmap(corner, mask, ink)

    def _length(self, run: str, wide: bool) -> float:
        if not wide:
            return self.latin.getlength(run)
        return cv2.getTextSize((0, 0), run, (0, 0), _opencv_font(), self.wide)[2]


def legible(text: str) -> str:
    """The text with letters that there are in one of the fonts."""
    return " ".join("".join(_legible(letter) for letter in text).split())


@lru_cache(maxsize=10_000)
def _legible(letter: str) -> str:
    if letter.isspace():
        return " "
    category = unicodedata.category(letter)
    if category[0] != "C" and (ord(letter) in _in_dejavu() or _in_opencv(letter)):
        return letter
    plain = "" if category == "Cs" else anyascii(letter)
    if plain and plain.isprintable():
        return plain
    # A joiner or an accent is nothing to be seen alone.
    return "" if category in ("Cf", "Mn", "Me") else f"U+{ord(letter):04X}"


def _runs(text: str) -> list[tuple[str, bool]]:
    """The legible text in parts of one font, and whether that is OpenCV's."""
    parts = groupby(legible(text), key=lambda letter: ord(letter) not in _in_dejavu())
    return [("".join(letters), wide) for wide, letters in parts]


@lru_cache(maxsize=1)
def _in_dejavu() -> frozenset[int]:
    return frozenset(FT2Font(DEJAVU).get_charmap())


@lru_cache(maxsize=1)
def _opencv_font():
    """The font for Chinese, Japanese and Korean; None before OpenCV 5."""
    return cv2.FontFace("uni") if hasattr(cv2, "FontFace") else None


def _in_opencv(letter: str) -> bool:
    if _opencv_font() is None:
        return False
    return not np.array_equal(_opencv_glyph(letter), _opencv_glyph("\uffff"))  # which is no letter


def _opencv_glyph(letter: str) -> np.ndarray:
    pixels = np.zeros((40, 80), np.uint8)
    cv2.putText(pixels, letter, (10, 30), 255, _opencv_font(), 24)
    return pixels
