"""Photos: where queries of each combination of experts are, and two models beside the truth."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..data.boxes import corners
from ..data.images import read_image
from ..data.visualization import contact_sheet, draw_boxes, phrase_colors
from .collect import Collection
from .combinations import FITS, combination, label
from .figure import ReportFigure, slug
from .objects import Objects, image_spans

SHEET = 1100  # pixels
BOXES, DOTS = 6, 60  # detections of a photo that are drawn
RIGHT, WRONG, TRUTH = (40, 190, 90), (255, 75, 75), (70, 130, 255)


# Tokens to experts


def token_pictures(collection: Collection, prefix: str, count: int = 4) -> ReportFigure | None:
    """Photos with the best detections and further queries, by their combination of experts, in the
    first, the middle and the last MoE layer of the decoder. None where no photo can be read."""
    layers = [layer.name for layer in collection.decoder]
    chosen = sorted({0, len(layers) // 2, len(layers) - 1})
    spans, pictures, captions, rows = image_spans(collection), [], [], []
    for image_id in spread(collection, count):
        image = read_or_none(collection.files[image_id])
        if image is None or image_id not in spans:
            continue
        first, last = spans[image_id]
        boxes = corners(collection.predictions.boxes[first:last])
        scores = collection.predictions.scores[first:last]
        names = [collection.names[c] for c in collection.predictions.category_ids[first:last]]
        best = distinct_queries(boxes)
        for layer in chosen:
            taken = [label(combination(ids)) for ids in collection.experts[first:last, layer]]
            colors = phrase_colors([taken[i] for i in best])
            shown, others = best[:BOXES], best[BOXES : BOXES + DOTS]
            canvas = draw_dots(image, boxes[others], [colors[taken[i]] for i in others])
            pictures.append(
                draw_boxes(
                    canvas,
                    boxes[shown].tolist(),
                    [f"{taken[i]}: {names[i]}" for i in shown],
                    colors=[colors[taken[i]] for i in shown],
                    min_size=480,
                )
            )
            captions.append(f"{layers[layer]}; {Path(collection.files[image_id]).name}")
            rows += [
                [image_id, layers[layer], names[i], float(scores[i]), *boxes[i].tolist(), taken[i]]
                for i in (*shown, *others)
            ]
    if not pictures:
        return None
    return ReportFigure(
        slug(prefix, "tokens"),
        "Queries and their experts",
        "Each colour is a combination of experts (the numbers on the label): boxes are the best "
        "detections, dots the centres of further queries. A row is one photo, layer by layer.",
        ["image", "layer", "name", "score", "x0", "y0", "x1", "y1", "experts"],
        rows,
        contact_sheet(pictures, len(chosen), captions, SHEET),
        shown=0,
    )


def spread(collection: Collection, count: int) -> list[int | str]:
    """Images with at least two objects, or else any, evenly spread over the data set."""
    objects = defaultdict(int)
    for annotation in collection.truth["annotations"]:
        objects[annotation["image_id"]] += 1
    images = [i for i in collection.files if objects[i] >= 2] or list(collection.files)
    step = max(1.0, len(images) / count)
    return [images[int(k * step)] for k in range(min(count, len(images)))]


def distinct_queries(boxes: np.ndarray) -> list[int]:
    """The first detection of each query: one query's detections have one box."""
    seen: dict[tuple, int] = {}
    for i, box in enumerate(boxes.tolist()):
        seen.setdefault(tuple(box), i)
    return list(seen.values())


def draw_dots(image: np.ndarray, boxes: np.ndarray, colors: list[tuple]) -> np.ndarray:
    canvas = Image.fromarray(image).convert("RGB")
    pen = ImageDraw.Draw(canvas)
    radius = max(2, round(max(canvas.size) / 130))
    for (x0, y0, x1, y1), color in zip(boxes, colors, strict=True):
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        around = (x - radius, y - radius, x + radius, y + radius)
        pen.ellipse(around, fill=color, outline="white")
    return np.asarray(canvas)


def read_or_none(file: str) -> np.ndarray | None:
    """The photo; None where features came from a cache and the file isn't there."""
    try:
        return read_image({"file_name": file})
    except (OSError, ValueError):
        return None


# Before and after


@dataclass
class Verdict:
    """Of one image, as many of a model's best detections as there are objects.

    rows   their places among all predictions
    right  which of them find an object: its class, IoU at least 0.5, each object once
    found  of the image's objects, in order: whether one of the detections finds it
    """

    rows: list[int]
    right: list[bool]
    found: list[bool]


def verdicts(collection: Collection, objects: Objects) -> dict[int | str, Verdict]:
    """Of every image that has objects."""
    spans = image_spans(collection)
    result = {}
    for image_id, wanted in objects_by_image(objects).items():
        first, last = spans.get(image_id, (0, 0))
        rows = list(range(first, min(last, first + len(wanted))))
        boxes = corners(np.array([objects.annotations[i]["bbox"] for i in wanted]))
        right, found = [], [False] * len(wanted)
        for row in rows:
            overlap = iou_of(corners(collection.predictions.boxes[row])[0], boxes)
            category = collection.predictions.category_ids[row]
            free = [
                (-overlap[k], k)
                for k, i in enumerate(wanted)
                if not found[k] and objects.category_ids[i] == category and overlap[k] >= FITS
            ]
            right.append(bool(free))
            if free:
                found[min(free)[1]] = True
        result[image_id] = Verdict(rows, right, found)
    return result


def before_after(
    before: Collection,
    after: Collection,
    objects: Objects,
    titles: tuple[str, str],
    prefix: str,
    count: int = 3,
) -> ReportFigure | None:
    """The images where the two models differ most, `count` each: better after, worse after, and
    with objects of rare or unseen names. None where no image can be read.

    Args:
        objects: those of the data set, by either collection.
        titles: of the models.
    """
    mine, its = verdicts(after, objects), verdicts(before, objects)
    change = {i: sum(mine[i].found) - sum(its[i].found) for i in mine if i in its}
    better, worse = (sum(sign * c > 0 for c in change.values()) for sign in (1, -1))
    by_image = objects_by_image(objects)
    novel = {c["id"] for c in after.truth["categories"] if c.get("novel")}
    special = {
        i
        for i in change
        if any(objects.tail[k] or objects.category_ids[k] in novel for k in by_image[i])
    }
    pictures, captions, rows = [], [], []
    for image_id, kind in most_different(change, special, count).items():
        image = read_or_none(after.files[image_id])
        if image is None:
            continue
        wanted = by_image[image_id]
        boxes = corners(np.array([objects.annotations[i]["bbox"] for i in wanted])).tolist()
        names = [after.names[c] for c in objects.category_ids[wanted].tolist()]
        pictures.append(draw_boxes(image, boxes, names, colors=[TRUTH] * len(boxes), min_size=480))
        captions.append(f"objects ({kind})")
        rows += [
            [image_id, kind, "truth", n, None, *b, None] for n, b in zip(names, boxes, strict=True)
        ]
        for collection, verdict, title in (
            (before, its[image_id], titles[0]),
            (after, mine[image_id], titles[1]),
        ):
            found = collection.predictions[np.array(verdict.rows, int)]
            boxes = corners(found.boxes).tolist()
            names = [collection.names[c] for c in found.category_ids.tolist()]
            colors = [RIGHT if right else WRONG for right in verdict.right]
            scores = found.scores.tolist()
            pictures.append(draw_boxes(image, boxes, names, scores, colors=colors, min_size=480))
            captions.append(f"{title}: {sum(verdict.found)} of {len(wanted)}")
            columns = zip(names, scores, boxes, verdict.right, strict=True)
            rows += [[image_id, kind, title, n, s, *b, r] for n, s, b, r in columns]
    if not pictures:
        return None
    return ReportFigure(
        slug(prefix, "before-after"),
        f"{titles[0]} and {titles[1]} where they differ most",
        "Left the objects; then, of each model, as many of its best detections as there are "
        "objects: green ones find an object, red ones are mistakes. First the photos that the "
        "second model does better, then those that it does worse, then others with rare or unseen "
        f"names. Of {len(change)} photos {better} are better, {worse} worse, the others "
        "equal.",
        ["image", "kind", "model", "name", "score", "x0", "y0", "x1", "y1", "right"],
        rows,
        contact_sheet(pictures, 3, captions, SHEET),
        shown=0,
    )


def most_different(change: dict, special: set, count: int) -> dict:
    """{image id: "better", "worse" or "rare or unseen name"}, at most `count` images of each.

    Args:
        change: {image id: objects found more, or fewer}.
        special: ids of images with objects of rare or unseen names.
    """
    order = {i: n for n, i in enumerate(change)}
    better = sorted((i for i in change if change[i] > 0), key=lambda i: (-change[i], order[i]))
    worse = sorted((i for i in change if change[i] < 0), key=lambda i: (change[i], order[i]))
    rare = [i for i in (*better, *worse) if i in special]
    rare.sort(key=lambda i: (-abs(change[i]), -change[i], order[i]))
    kinds: dict = {}
    for kind, images in (("better", better), ("worse", worse), ("rare or unseen name", rare)):
        fresh = [i for i in images if i not in kinds]
        kinds |= dict.fromkeys(fresh[:count], kind)
    return kinds


def objects_by_image(objects: Objects) -> dict[int | str, list[int]]:
    rows = defaultdict(list)
    for i, annotation in enumerate(objects.annotations):
        rows[annotation["image_id"]].append(i)
    return rows


def iou_of(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Of one box with each of others, x0, y0, x1, y1."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    common = (high - low).clip(0).prod(1)
    areas = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return common / (areas - common).clip(1e-9)
