"""A look at what an evaluation found, next to what there was to find."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

from ..data.boxes import corners
from ..data.images import read_image
from ..data.visualization import contact_sheet, draw_boxes
from .predictions import DatasetPredictions

COUNT, COLUMNS = 12, 4


def results_sheet(
    truth: dict,
    predictions: DatasetPredictions,
    files: Mapping[int | str, str],
    names: Mapping[int, str],
    count: int = COUNT,
) -> np.ndarray | None:
    """Images spread over the data set, those that show an object: in colour the best detections, as
    many as there are objects, whatever their scores; in white the objects.

    Args:
        truth: what `read_ground_truth` returns.
        files: image id -> file, of the images that may be drawn.
        names: category id -> phrase.

    Returns uint8 [H, W, 3], RGB; None where no image can be drawn.
    """
    objects = defaultdict(list)
    for annotation in truth["annotations"]:
        if annotation["image_id"] in files and not annotation["iscrowd"]:
            objects[annotation["image_id"]].append(annotation)
    images = [image["id"] for image in truth["images"] if objects[image["id"]]]
    step = max(1, len(images) / count)
    pictures, captions = [], []
    for image_id in [images[int(i * step)] for i in range(min(count, len(images)))]:
        try:
            image = read_image({"file_name": files[image_id]})
        except (OSError, ValueError):
            continue  # features came from a cache: the evaluation didn't need the image
        mine = predictions[predictions.image_ids == image_id]
        mine = mine[np.argsort(-mine.scores, kind="stable")[: len(objects[image_id])]]
        pictures.append(
            draw_boxes(
                _outline(image, [a["bbox"] for a in objects[image_id]]),
                corners(mine.boxes),
                [names.get(category, "") for category in mine.category_ids.tolist()],
                mine.scores.tolist(),
            )
        )
        shown = dict.fromkeys(names.get(a["category_id"], "") for a in objects[image_id])
        captions.append(", ".join(shown))
    return contact_sheet(pictures, COLUMNS, captions) if pictures else None


def _outline(image: np.ndarray, boxes: list[list[float]]) -> np.ndarray:
    canvas = Image.fromarray(image)
    pen = ImageDraw.Draw(canvas)
    line = max(1, round(max(canvas.size) / 300))
    for x, y, width, height in boxes:
        pen.rectangle((x, y, x + width, y + height), outline="black", width=line + 2)
        pen.rectangle((x + 1, y + 1, x + width - 1, y + height - 1), outline="white", width=line)
    return np.asarray(canvas)
