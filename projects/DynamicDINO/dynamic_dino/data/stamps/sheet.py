"""Contact sheets: a look at the data with its boxes and phrases."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np

from .library import shrink

TILE = 320
COLUMNS, ROWS = 6, 4


def draw_sheet(folder: Path, split: str) -> Path:
    """Write ``<folder>/sheet_<split>.png``, 24 images spread over the split; returns its path."""
    document = json.loads((folder / "annotations" / f"{split}.json").read_text())
    names = {category["id"]: category["name"] for category in document["categories"]}
    boxes = defaultdict(list)
    for annotation in document["annotations"]:
        boxes[annotation["image_id"]].append((names[annotation["category_id"]], annotation["bbox"]))
    images = document["images"]
    chosen = images[:: max(1, len(images) // (COLUMNS * ROWS))][: COLUMNS * ROWS]
    sheet = np.full((ROWS * TILE, COLUMNS * TILE, 3), 40, np.uint8)
    for number, record in enumerate(chosen):
        path = folder / split / record["file_name"]
        image = cv2.imread(str(path))
        if image is None:
            raise FileNotFoundError(f"{path}: missing or not an image; build the data set again")
        scale = min(1, TILE / max(image.shape[:2]))
        image = shrink(image, TILE)
        for phrase, box in boxes[record["id"]]:
            x, y, w, h = (round(value * scale) for value in box)
            cv2.rectangle(image, (x, y), (x + w - 1, y + h - 1), (0, 255, 0), 1)
            at = (x + 1, max(9, y + 10))
            cv2.putText(image, phrase, at, 0, 0.38, (0, 0, 0), 2, cv2.LINE_AA)
            cv2.putText(image, phrase, at, 0, 0.38, (0, 255, 255), 1, cv2.LINE_AA)
        y, x = number // COLUMNS * TILE, number % COLUMNS * TILE
        sheet[y : y + image.shape[0], x : x + image.shape[1]] = image
    target = folder / f"sheet_{split}.png"
    cv2.imwrite(str(target), sheet)
    return target
