"""One composite image from (seed, split, index), and nothing else.

Every random number comes from a generator seeded with those three, so an image doesn't depend on
the others, nor on the number of workers. What the parts are for:

- One image in five is a close-up whose object fills most of the frame or more than all of it:
  photos of one thing are like that, and a detector that never saw one boxes parts of it.
- Objects are cut off by the border, occlude each other, have softened edges, shadows, defocus and
  their own light, so that the seam of a cut-out is no cue.
- Backgrounds are crops of photos at any scale, sharp or blurred, and studio-like plain ones.
- Whatever is pasted is annotated: a placement that would hide an earlier object too far is drawn
  again, or the new object is left out.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.random import Generator

from .library import Cutout, Library
from .vocabulary import Vocabulary

LONGEST_SIDE = 320
ASPECTS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16), (5, 4))
ASPECT_WEIGHTS = (0.2, 0.2, 0.13, 0.15, 0.09, 0.12, 0.05, 0.06)
OBJECT_COUNTS = (1, 2, 3, 4, 5, 6)
COUNT_WEIGHTS = (0.1, 0.18, 0.24, 0.2, 0.16, 0.12)
CLOSE_UPS = 0.22  # share of images with one object of 60% to 130% of the frame
SMALLEST = 16  # px, the longest side of the smallest objects
MIN_SHORT_SIDE = 7  # px: thin things stay thick enough to be seen
MAX_ENLARGEMENT = 4.0  # of the cut-out's own resolution
MIN_VISIBLE = 0.4  # of an object's area, after truncation and occlusion
DRAWN_WEIGHT = 0.35  # a drawn sprite is picked this often, relative to a photo of the same phrase
HEAD = 10  # phrases of the flat head of the frequency law
NOVEL_SHARE = 0.75  # of the objects of the novel split
ATTEMPTS = 8


@dataclass(frozen=True)
class SplitRecipe:
    """What one split draws from: phrases with probabilities, and a set of backgrounds."""

    name: str
    phrases: Sequence[str]
    weights: np.ndarray
    backgrounds: str
    required: frozenset[str] = frozenset()  # the first object is one of these, if there are any


@dataclass
class Composite:
    """An image (uint8 [h, w, 3] BGR) and its objects: phrases, boxes x, y, w, h in pixels."""

    image: np.ndarray
    phrases: list[str] = field(default_factory=list)
    boxes: list[tuple[int, int, int, int]] = field(default_factory=list)
    jpeg_quality: int = 90


def split_recipes(vocabulary: Vocabulary, seed: int) -> dict[str, SplitRecipe]:
    """train: seen phrases, long-tailed; val: the same phrases, uniform; val_novel: mostly novel.

    The tail is a Zipf-Mandelbrot law, 1 / (10 + rank), over a ranking of the seen phrases: the more
    pictures a phrase has, the more common (drawings count less than photos), ties in random order.
    """
    rng = np.random.default_rng([seed, zlib.crc32(b"ranking")])
    seen = [phrase for phrase in vocabulary.phrases if phrase not in vocabulary.novel]
    novel = [phrase for phrase in vocabulary.phrases if phrase in vocabulary.novel]
    variety = [
        sum(DRAWN_WEIGHT if name.startswith("sprite:") else 1.0 for name in vocabulary.pictures[p])
        for p in seen
    ]
    order = np.lexsort([rng.random(len(seen)), -np.minimum(variety, 3)])
    ranked = [seen[i] for i in order]
    zipf = 1 / (HEAD + np.arange(1, len(ranked) + 1))
    mixed = np.concatenate(
        [
            np.full(len(seen), (1 - NOVEL_SHARE) / len(seen)),
            np.full(len(novel), NOVEL_SHARE / max(1, len(novel))),
        ]
    )
    return {
        "train": SplitRecipe("train", ranked, zipf / zipf.sum(), "train"),
        "val": SplitRecipe("val", seen, np.full(len(seen), 1 / len(seen)), "held_out"),
        "val_novel": SplitRecipe(
            "val_novel", seen + novel, mixed / mixed.sum(), "held_out", frozenset(novel)
        ),
    }


def compose(
    library: Library, vocabulary: Vocabulary, recipe: SplitRecipe, seed: int, index: int
) -> Composite:
    """Compose image ``index`` of a split; it has at least one object."""
    rng = np.random.default_rng([seed, zlib.crc32(recipe.name.encode()), index])
    height, width = _canvas_size(rng)
    canvas = _background(library.backgrounds[recipe.backgrounds], height, width, rng)
    phrases, sides = _plan(vocabulary, recipe, max(height, width), rng)
    placed: list[tuple[str, np.ndarray, int]] = []  # phrase, visible mask, full area
    for phrase, side in zip(phrases, sides, strict=True):
        cutout = _pick(library, vocabulary, phrase, rng)
        for _ in range(ATTEMPTS):
            patch = _transform(cutout, side, rng)
            position = _position(patch.shape[:2], height, width, side, rng)
            if _paste(canvas, patch, position, phrase, placed, rng):
                break
            side = max(SMALLEST, 0.8 * side)
    composite = Composite(_finish(canvas, rng), jpeg_quality=int(rng.integers(60, 96)))
    for phrase, mask, _ in placed:
        composite.phrases.append(phrase)
        composite.boxes.append(tuple(int(v) for v in cv2.boundingRect(mask)))
    return composite


def _canvas_size(rng: Generator) -> tuple[int, int]:
    across, down = ASPECTS[rng.choice(len(ASPECTS), p=ASPECT_WEIGHTS)]
    scale = LONGEST_SIDE / max(across, down)
    return round(down * scale), round(across * scale)


def _plan(
    vocabulary: Vocabulary, recipe: SplitRecipe, frame: int, rng: Generator
) -> tuple[list[str], list[float]]:
    """Phrases and longest sides (px), large ones mostly first, that is, behind.

    Two objects with different but near-synonymous phrases never share an image: a prompt with one
    of the phrases would find the other object without a label.
    """
    close_up = rng.random() < CLOSE_UPS
    if close_up:
        sides = [frame * rng.uniform(0.6, 1.3)]
        sides += [frame * rng.uniform(0.08, 0.25) for _ in range(rng.choice(3, p=[0.7, 0.2, 0.1]))]
    else:
        count = rng.choice(OBJECT_COUNTS, p=COUNT_WEIGHTS)
        largest = frame * (0.85 if count < 3 else 0.65)
        sides = list(np.exp(rng.uniform(np.log(0.09 * frame), np.log(largest), count)))
        tiny = rng.random(count) < 0.05
        sides = [rng.uniform(SMALLEST, 24) if t else s for t, s in zip(tiny, sides, strict=True)]
        if rng.random() < 0.75:
            sides.sort(reverse=True)
    phrases: list[str] = []
    for position in range(len(sides)):
        for _ in range(ATTEMPTS):
            phrase = recipe.phrases[rng.choice(len(recipe.phrases), p=recipe.weights)]
            if position == 0 and recipe.required and phrase not in recipe.required:
                continue
            if not any(other in vocabulary.synonyms_of(phrase) for other in phrases):
                phrases.append(phrase)
                break
        else:
            if position == 0:  # unlucky in every attempt
                phrases.append(sorted(recipe.required)[rng.integers(len(recipe.required))])
    return phrases, sides[: len(phrases)]


def _pick(library: Library, vocabulary: Vocabulary, phrase: str, rng: Generator) -> Cutout:
    cutouts = [library.cutouts[name] for name in vocabulary.pictures[phrase]]
    weights = np.array([DRAWN_WEIGHT if cutout.drawn else 1.0 for cutout in cutouts])
    return cutouts[rng.choice(len(cutouts), p=weights / weights.sum())]


def _transform(cutout: Cutout, side: float, rng: Generator) -> np.ndarray:
    """Scaled, rotated, flipped, tilted, re-lit: float32 [h, w, 4] in 0..1, premultiplied."""
    source = cutout.image
    h, w = source.shape[:2]
    scale = min(side / max(h, w), MAX_ENLARGEMENT)
    scale = max(scale, MIN_SHORT_SIDE / min(h, w))
    stretch = np.exp(rng.uniform(-0.15, 0.15))
    size_x, size_y = w * scale * np.sqrt(stretch), h * scale / np.sqrt(stretch)
    if scale < 0.7:  # area averaging first, the warp below would alias
        shrunk = (max(2, round(size_x)), max(2, round(size_y)))
        source = cv2.resize(source, shrunk, interpolation=cv2.INTER_AREA)
        h, w = source.shape[:2]
    if cutout.any_angle and rng.random() < 0.5:
        angle = rng.uniform(-np.pi, np.pi)
    else:
        angle = np.deg2rad(rng.normal(0, 7))
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [size_x / 2, size_y / 2]
    corners = corners * (1 + rng.uniform(-0.08, 0.08, (4, 2)) * (rng.random() < 0.6))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = corners @ rotation.T
    if cutout.flip and rng.random() < 0.5:
        corners[:, 0] *= -1
    margin = 3  # room for soft edges
    corners = corners - corners.min(0) + margin
    target_w, target_h = (int(v) for v in np.ceil(corners.max(0)) + margin)
    origin = np.float32([[0, 0], [w, 0], [w, h], [0, h]])
    matrix = cv2.getPerspectiveTransform(origin, np.float32(corners))
    patch = cv2.warpPerspective(source, matrix, (target_w, target_h), flags=cv2.INTER_LINEAR)
    return _relight(patch, min(target_h, target_w), rng)


def _relight(patch: np.ndarray, short_side: int, rng: Generator) -> np.ndarray:
    """Colour, contrast, defocus and edge softness of one object."""
    patch = patch.astype(np.float32) * np.float32(1 / 255)
    matrix = np.eye(4)
    matrix[:3, :3] = _colour_matrix(rng.uniform(0.8, 1.2), 0.06, rng.uniform(0.7, 1.15), rng)
    matrix[:3, 3] = rng.uniform(-0.06, 0.08)  # haze, or deeper shadows
    alpha = cv2.merge([patch[..., 3]] * 4)
    patch = cv2.min(cv2.max(cv2.transform(patch, matrix), 0), alpha)
    if rng.random() < 0.6:
        sigma = rng.uniform(0.4, 1.0) if rng.random() < 0.75 else rng.uniform(1.0, 2.0)
        sigma = min(sigma, short_side / 20)
        if sigma > 0.25:
            patch = cv2.GaussianBlur(patch, (0, 0), sigma)
    if rng.random() < 0.5:  # thins the edge, where the old background shines through
        patch *= np.clip((patch[..., 3:] - 0.3) / 0.5, 0, 1)
    return patch


def _position(
    patch: tuple[int, int], height: int, width: int, side: float, rng: Generator
) -> tuple[int, int]:
    """Top-left corner; three in four objects that fit lie inside, others may cross the border."""
    inside = rng.random() < 0.75
    corner = []
    for extent, frame in zip(patch, (height, width), strict=True):
        slack = frame - extent
        if inside or slack < 0 and rng.random() < 0.5:
            low, high = min(0, slack), max(0, slack)
        else:
            low, high = -0.5 * extent, frame - 0.5 * extent
        corner.append(int(np.floor(rng.uniform(low, high + 1))))
    return corner[0], corner[1]


def _paste(
    canvas: np.ndarray,
    patch: np.ndarray,
    position: tuple[int, int],
    phrase: str,
    placed: list[tuple[str, np.ndarray, int]],
    rng: Generator,
) -> bool:
    """Paste in place and record the visible mask, unless too little of any object would be seen."""
    height, width = canvas.shape[:2]
    top, left = position
    y0, x0 = max(0, top), max(0, left)
    y1, x1 = min(height, top + patch.shape[0]), min(width, left + patch.shape[1])
    solid = (patch[..., 3] > 0.5).astype(np.uint8)
    full = cv2.countNonZero(solid)
    if y1 <= y0 or x1 <= x0 or full == 0:
        return False
    rows, columns = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
    mask = np.zeros((height, width), np.uint8)
    mask[y0:y1, x0:x1] = solid[rows, columns]
    if cv2.countNonZero(mask) < MIN_VISIBLE * full or min(cv2.boundingRect(mask)[2:]) < 4:
        return False
    rest = [(name, cv2.subtract(other, mask), area) for name, other, area in placed]
    if any(cv2.countNonZero(other) < MIN_VISIBLE * area for _, other, area in rest):
        return False
    if rng.random() < 0.3:
        _shadow(canvas, patch[..., 3], position, rng)
    region, visible = canvas[y0:y1, x0:x1], patch[rows, columns]
    through = cv2.merge([1 - visible[..., 3]] * 3)
    canvas[y0:y1, x0:x1] = region * through + visible[..., :3]
    placed[:] = [*rest, (phrase, mask, full)]
    return True


def _shadow(
    canvas: np.ndarray, alpha: np.ndarray, position: tuple[int, int], rng: Generator
) -> None:
    h, w = alpha.shape
    reach = max(2, 0.06 * max(h, w))
    dy, dx = rng.uniform(0, reach), rng.uniform(-reach, reach)
    shift = np.float32([[1, 0, position[1] + dx], [0, 1, position[0] + dy]])
    shade = cv2.warpAffine(alpha, shift, canvas.shape[1::-1])
    shade = cv2.GaussianBlur(shade, (0, 0), max(1.0, reach / 2))
    canvas *= cv2.merge([1 - rng.uniform(0.2, 0.5) * shade] * 3)


def _background(
    photos: Sequence[np.ndarray], height: int, width: int, rng: Generator
) -> np.ndarray:
    """float32 [height, width, 3] in 0..1: a crop of a photo, often blurred, or a backdrop."""
    kind = rng.random()
    if kind < 0.15 or not len(photos):
        return _backdrop(height, width, rng)
    photo = photos[rng.integers(len(photos))]
    h, w = photo.shape[:2]
    fit = min(h / height, w / width)
    zoom = fit * np.exp(rng.uniform(np.log(0.2), 0))  # photo pixels per canvas pixel
    crop_h, crop_w = max(8, int(height * zoom)), max(8, int(width * zoom))
    y, x = rng.integers(h - crop_h + 1), rng.integers(w - crop_w + 1)
    crop = photo[y : y + crop_h, x : x + crop_w]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    canvas = cv2.resize(
        crop, (width, height), interpolation=cv2.INTER_AREA if zoom > 1 else cv2.INTER_LINEAR
    )
    canvas = canvas.astype(np.float32) / 255
    if rng.random() < 0.35:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(1, 8))
    gain = rng.uniform(0.75, 1.15) * (1 + rng.uniform(-0.1, 0.1, 3))
    return np.minimum(canvas * gain.astype(np.float32), 1)


def _backdrop(height: int, width: int, rng: Generator) -> np.ndarray:
    """Plain or shaded: white and grey like a studio, or any muted colour."""
    if rng.random() < 0.6:
        base = np.full(
            3, rng.choice([1.0, rng.uniform(0.8, 1), rng.uniform(0.1, 0.9), rng.uniform(0, 0.12)])
        )
    else:
        base = rng.uniform(0, 1, 3) * 0.7 + rng.uniform(0, 0.3)
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    slope = rng.uniform(0, 0.3) * (rng.random() < 0.7)
    shade = 1 + slope * (np.cos(angle) * x + np.sin(angle) * y - 1) / 2
    return np.clip(base * shade[..., None], 0, 1).astype(np.float32)


def _finish(canvas: np.ndarray, rng: Generator) -> np.ndarray:
    """The camera: exposure, gamma, white balance, saturation, blur and noise of the whole image."""
    gamma, saturation = np.exp(rng.uniform(-0.3, 0.3)), 1.0
    if rng.random() < 0.4:
        saturation = rng.uniform(0.6, 1.2)
    levels = (np.arange(256) / 255) ** gamma * 255
    canvas = cv2.LUT(cv2.convertScaleAbs(canvas, alpha=255), levels.astype(np.float32))
    canvas = cv2.transform(canvas, _colour_matrix(rng.uniform(0.8, 1.15), 0.06, saturation, rng))
    if rng.random() < 0.15:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.4, 1.2))
    if rng.random() < 0.3:
        noise = rng.standard_normal(canvas.shape, dtype=np.float32)
        canvas = canvas + noise * np.float32(rng.uniform(1, 11))
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def _colour_matrix(gain: float, balance: float, saturation: float, rng: Generator) -> np.ndarray:
    """BGR -> BGR [3, 3]: brightness, white balance (+-balance per channel) and saturation."""
    grey = np.array([[0.114, 0.587, 0.299]])
    matrix = saturation * np.eye(3) + (1 - saturation) * np.ones((3, 1)) * grey
    return gain * (1 + rng.uniform(-balance, balance, (3, 1))) * matrix
