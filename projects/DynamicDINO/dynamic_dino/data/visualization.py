"""Pictures of detections: boxes with phrases, and sheets of several pictures."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
from detectron2.structures import Instances
from PIL import Image, ImageDraw

from .images import ImageLike, as_array
from .lettering import LabelFont

Color = tuple[int, int, int]
Rect = tuple[float, float, float, float]  # x0, y0, x1, y1

# Far apart in hue and lightness, bright enough to stand out on photos.
PALETTE: tuple[Color, ...] = (
    (255, 75, 75),
    (40, 190, 90),
    (70, 130, 255),
    (255, 190, 20),
    (190, 85, 255),
    (0, 205, 215),
    (255, 120, 20),
    (255, 105, 190),
    (150, 215, 40),
    (130, 105, 245),
    (0, 150, 135),
    (215, 150, 95),
)
UNTRACKED: Color = (190, 190, 190)


def draw_detections(
    image: ImageLike,
    detections: Instances,
    threshold: float = 0.0,
    min_size: int = 640,
) -> np.ndarray:
    """The image with a box and a label, phrase and score, for each detection.

    Args:
        image: a path, a PIL image or an array, see `as_array`.
        detections: pred_boxes in pixels of the image, scores, phrases; track_ids, where there are
            some, are written behind the phrase, and each has a colour of its own.
        threshold: leaves out detections with a lower score.
        min_size: an image whose longer side is shorter is enlarged to it, so that labels can be
            read; 0 keeps the size.

    Returns:
        uint8 [H', W', 3], RGB, of the image's aspect ratio.
    """
    detections = detections[detections.scores >= threshold]
    order = detections.scores.argsort(descending=True).tolist()
    phrases, colors = [detections.phrases[i] for i in order], None
    if detections.has("track_ids"):
        tracks = detections.track_ids[order].tolist()
        phrases = [f"{p} #{t}" if t else p for p, t in zip(phrases, tracks, strict=True)]
        colors = [PALETTE[t % len(PALETTE)] if t else UNTRACKED for t in tracks]
    return draw_boxes(
        image,
        detections.pred_boxes.tensor[order].tolist(),
        phrases,
        detections.scores[order].tolist(),
        min_size,
        colors,
    )


def draw_boxes(
    image: ImageLike,
    boxes: Sequence[Sequence[float]],
    phrases: Sequence[str],
    scores: Sequence[float] | None = None,
    min_size: int = 640,
    colors: Sequence[Color] | None = None,
) -> np.ndarray:
    """The image with a box and a label, phrase and score if there are scores, for each object.

    Args:
        image: a path, a PIL image or an array, see `as_array`.
        boxes: x0, y0, x1, y1 in pixels of the image, the most important first.
        min_size: see `draw_detections`.
        colors: one for each object. Default: one for each phrase.

    Returns:
        uint8 [H', W', 3], RGB, of the image's aspect ratio.
    """
    canvas = Image.fromarray(as_array(image))
    scale = max(1.0, min_size / max(canvas.size))
    if scale > 1:
        size = (max(round(canvas.width * scale), 1), max(round(canvas.height * scale), 1))
        canvas = canvas.resize(size, Image.Resampling.BICUBIC)
    boxes = [[v * scale for v in box] for box in boxes]
    endings = [""] * len(boxes) if scores is None else [f" {score:.2f}" for score in scores]
    if colors is None:
        of_phrase = phrase_colors(phrases)
        colors = [of_phrase[phrase] for phrase in phrases]

    unit = max(canvas.size) / 640  # line widths and letters grow with the picture
    line = max(2, round(2.6 * unit))
    pen = ImageDraw.Draw(canvas, "RGBA")
    for box, color in reversed(list(zip(boxes, colors, strict=True))):
        _draw_box(pen, box, color, line, canvas.size)
    crowding = min(1.0, (12 / max(len(boxes), 1)) ** 0.35)
    font = _font(max(10, round(14 * unit * crowding)))
    tags: list[Rect] = []
    texts = []
    for box, phrase, ending in zip(boxes, phrases, endings, strict=True):
        others = [b for b in boxes if b is not box]
        texts.append(_shorten(phrase, ending, font, canvas.width - 2 * line))
        tags.append(_place(_text_size(texts[-1], font), box, tags, others, line, canvas.size))
    # The best last, so that where labels can't but overlap, theirs are on top.
    for tag, text, color in reversed(list(zip(tags, texts, colors, strict=True))):
        _draw_tag(pen, tag, text, color, font)
    return np.asarray(canvas)


def phrase_colors(phrases: Sequence[str]) -> dict[str, Color]:
    """A colour for each phrase: the same in every picture, unless two phrases of one picture would
    share it; then the next free one."""
    colors: dict[str, Color] = {}
    taken: set[int] = set()
    for phrase in sorted(set(phrases)):
        index = zlib.crc32(phrase.casefold().encode()) % len(PALETTE)
        while index in taken and len(taken) < len(PALETTE):
            index = (index + 1) % len(PALETTE)
        taken.add(index)
        colors[phrase] = PALETTE[index]
    return colors


def contact_sheet(
    images: Sequence[np.ndarray],
    columns: int = 3,
    captions: Sequence[str] | None = None,
    width: int = 1600,
) -> np.ndarray:
    """Pictures in rows of `columns`, each row scaled to one height, with captions below them.

    Args:
        images: uint8 [H, W, 3], RGB, of any sizes.
        captions: one for each image; longer ones than the picture is wide are cut with an ellipsis.
        width: of the sheet, in pixels.

    Returns:
        uint8 [H', width, 3], RGB.
    """
    if not len(images):
        raise ValueError("a contact sheet needs at least one image")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images")
    columns = max(1, min(columns, len(images)))
    gap = max(width // 110, 4)
    font = _font(max(12, width // 95))
    caption_height = 2 * _text_size("Ag", font)[1] if captions is not None else 0
    tallest = width  # a single portrait must not make a row of its own height

    rows, typical = [], None
    for start in range(0, len(images), columns):
        row = images[start : start + columns]
        free = width - gap * (len(row) + 1)
        height = min(free / sum(i.shape[1] / i.shape[0] for i in row), tallest)
        if len(row) < columns and typical:  # the last row: not larger than the others
            height = min(height, typical)
        typical = typical or height
        rows.append((start, row, max(int(height), 1)))

    total = gap + sum(height + caption_height + gap for _, _, height in rows)
    sheet = Image.new("RGB", (width, total), "white")
    pen = ImageDraw.Draw(sheet)
    y = gap
    for start, row, height in rows:
        x = gap
        for i, image in enumerate(row, start=start):
            w = max(int(height * image.shape[1] / image.shape[0]), 1)
            picture = Image.fromarray(image).resize((w, height), Image.Resampling.LANCZOS)
            sheet.paste(picture, (x, y))
            if captions is not None:
                text = _shorten(captions[i], "", font, w)
                middle = (x + font.getlength(text) / 2, y + height + caption_height / 2)
                font.draw(pen, middle, text, (60, 60, 60))
            x += w + gap
        y += height + caption_height + gap
    return np.asarray(sheet)


def _draw_box(pen: ImageDraw.ImageDraw, box: Rect, color: Color, line: int, size) -> None:
    width, height = size
    x0, y0 = max(box[0], 0), max(box[1], 0)
    x1, y1 = max(min(box[2], width - 1), x0), max(min(box[3], height - 1), y0)
    # A dark seam outside the line keeps it visible on a background of its own colour.
    for grow, ink, width in ((1, (0, 0, 0, 110), line + 2), (0, (*color, 255), line)):
        corners = (x0 - grow, y0 - grow, x1 + grow, y1 + grow)
        side = min(x1 - x0, y1 - y0) + 2 * grow
        if side > 3 * line + 6:
            pen.rounded_rectangle(corners, 1.5 * line, outline=ink, width=width)
        else:  # too small for round corners: lines that meet in the middle at most
            pen.rectangle(corners, outline=ink, width=max(1, min(width, int(side / 2))))


def _draw_tag(pen: ImageDraw.ImageDraw, tag: Rect, text: str, color: Color, font) -> None:
    pen.rounded_rectangle(tag, (tag[3] - tag[1]) / 5, fill=(*color, 235))
    light = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 120
    ink = (0, 0, 0, 255) if light else (255, 255, 255, 255)
    middle = ((tag[0] + tag[2]) / 2, (tag[1] + tag[3]) / 2)
    font.draw(pen, middle, text, ink)


def _place(
    text_size: tuple[int, int],
    box: Rect,
    placed: Sequence[Rect],
    others: Sequence[Rect],
    line: int,
    size: tuple[int, int],
) -> Rect:
    """Where a box's label goes: at one of the box's corners or edges, inside the image, on no other
    label where that is possible, and rather not on another box."""
    pad = max(2, text_size[1] // 4)
    w, h = text_size[0] + 2 * pad, text_size[1] + 2 * pad
    x0, y0, x1, y1 = box

    def fit(left: float, top: float) -> Rect:
        left = min(max(left, 0), max(size[0] - w - 1, 0))
        top = min(max(top, 0), max(size[1] - h - 1, 0))
        return left, top, left + w, top + h

    def hidden(tag: Rect) -> float:
        return sum(_overlap(tag, other) for other in placed) / (w * h)

    tops = (y0 - h, y0 + line, y1, y1 - h - line)
    lefts = (x0, x1 - w, (x0 + x1 - w) / 2)
    corners = [fit(left, top) for top in tops for left in lefts]
    covering = [sum(_overlap(tag, other) for other in others) / (w * h) for tag in corners]
    costs = [10 * hidden(corners[i]) + 0.5 * covering[i] + 0.01 * i for i in range(len(corners))]
    best = corners[costs.index(min(costs))]
    if hidden(best):  # no corner is free: the nearest free place along or in the box
        rows = np.arange(y0 - 4 * h, y1 + 4 * h, h)[:40]
        columns = np.arange(x0 - 2 * w, x1 + 2 * w, w / 2)[:40]
        places = sorted((fit(x, y) for y in rows for x in columns), key=lambda t: _distance(t, box))
        best = next((tag for tag in places if not hidden(tag)), best)
    return best


def _distance(tag: Rect, box: Rect) -> float:
    """Between the label's middle and the nearest point of the box's outline, roughly."""
    x, y = (tag[0] + tag[2]) / 2, (tag[1] + tag[3]) / 2
    outside = max(box[0] - x, x - box[2], 0) + max(box[1] - y, y - box[3], 0)
    inside = min(abs(x - box[0]), abs(x - box[2]), abs(y - box[1]), abs(y - box[3]))
    return outside or inside


def _overlap(a: Rect, b: Rect) -> float:
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def _shorten(text: str, ending: str, font, width: float) -> str:
    """`text` + `ending`, with so much of `text` cut that it fits the width."""
    if font.getlength(text + ending) <= width:
        return text + ending
    while text and font.getlength(text + "…" + ending) > width:
        text = text[:-1]
    return text.rstrip() + "…" + ending


def _text_size(text: str, font) -> tuple[int, int]:
    """Width of this text; height of the font, the same for all texts."""
    return math.ceil(font.getlength(text)), round(0.8 * (font.ascent + font.descent))


def _font(size: int) -> LabelFont:
    return LabelFont(size)
