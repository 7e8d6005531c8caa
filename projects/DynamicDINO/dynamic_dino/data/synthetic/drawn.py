"""A tiny data set that needs no download: coloured shapes on noise and gradients.

python -m dynamic_dino.data.synthetic.drawn    # drawn_{train,val} under DETECTRON2_DATASETS
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ...console import command, program
from ..datasets import dataset_root

Picture = tuple[Image.Image, list[tuple[int, list[int]]]]
Draw = Callable[[np.random.Generator], Picture]

COLORS = {
    "red": (215, 40, 40),
    "green": (40, 165, 70),
    "blue": (50, 80, 215),
    "yellow": (235, 210, 50),
}
SHAPES = ("circle", "square", "triangle")
NAMES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)


def write_drawn_dataset(
    root: str | Path, num_images: int = 32, size: int = 128, seed: int = 0, split: str = "train"
) -> Path:
    """Writes `num_images` PNGs to ``root/drawn/<split>`` and their COCO JSON, whose path it
    returns; the same arguments give the same files.

    Images are about `size` pixels, of three aspect ratios, and hold 1-4 shapes that don't overlap.
    """
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, start=1)]
    return write_pictures(
        Path(root) / "drawn", split, num_images, seed, categories, lambda rng: draw_image(rng, size)
    )


def write_pictures(
    folder: Path, split: str, count: int, seed: int, categories: list[dict], draw: Draw
) -> Path:
    """Writes `count` PNGs to ``folder/<split>`` and their COCO JSON, whose path it returns.

    draw: random generator -> a picture and its objects, (index into `categories`, [x, y, w, h]).
    Image i is a function of `seed` and i alone.
    """
    json_file = folder / "annotations" / f"{split}.json"
    (folder / split).mkdir(parents=True, exist_ok=True)
    json_file.parent.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for image_id in range(1, count + 1):
        picture, objects = draw(np.random.default_rng([seed, image_id]))
        name = f"{image_id:06d}.png"
        picture.save(folder / split / name)
        images.append(
            {"id": image_id, "file_name": name, "width": picture.width, "height": picture.height}
        )
        for label, box in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": categories[label]["id"],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    content = {"images": images, "annotations": annotations, "categories": categories}
    json_file.write_text(json.dumps(content), encoding="utf-8")
    return json_file


def draw_image(rng: np.random.Generator, size: int) -> Picture:
    """A picture and its objects: (index into NAMES, [x, y, w, h])."""
    width, height = [(size, size), (size, size * 3 // 4), (size * 3 // 4, size)][rng.integers(3)]
    canvas = Image.fromarray(background(rng, width, height))
    pen = ImageDraw.Draw(canvas)
    objects = []
    for _ in range(int(rng.integers(1, 5))):
        side = int(rng.integers(size // 6, size // 2))
        x, y = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
        if any(touch((x, y, side, side), box) for _, box in objects):
            continue
        label = int(rng.integers(len(NAMES)))
        color, shape = NAMES[label].split()
        corners = (x, y, x + side - 1, y + side - 1)
        if shape == "circle":
            pen.ellipse(corners, fill=COLORS[color])
        elif shape == "square":
            pen.rectangle(corners, fill=COLORS[color])
        else:
            left, top, right, bottom = corners
            pen.polygon([(left, bottom), (right, bottom), (x + side // 2, top)], fill=COLORS[color])
        objects.append((label, [x, y, side, side]))
    return canvas, objects


def background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A grey-toned gradient with noise: uint8 [height, width, 3]."""
    ends = rng.integers(60, 200, size=(2, 3))
    ramp = np.linspace(0, 1, width)[None, :, None]
    noise = rng.normal(0, 12, size=(height, width, 3))
    return (ends[0] * (1 - ramp) + ends[1] * ramp + noise).clip(0, 255).astype(np.uint8)


def touch(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two boxes [x, y, w, h] overlap."""
    return not (
        a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0] or a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1]
    )


@command
def main() -> None:
    parser = argparse.ArgumentParser(prog=program(), description=__doc__)
    parser.add_argument("--root", type=Path, default=dataset_root(), help="default: %(default)s")
    parser.add_argument("--num-images", type=int, default=256, help="of the training split")
    parser.add_argument("--size", type=int, default=160)
    args = parser.parse_args()
    write_drawn_dataset(args.root, args.num_images, args.size, seed=0, split="train")
    write_drawn_dataset(args.root, args.num_images // 4, args.size, seed=1, split="val")
    print(f"wrote drawn_train and drawn_val to {args.root / 'drawn'}")


if __name__ == "__main__":
    main()
