"""Reading and resizing images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from PIL import Image, ImageOps

Record = dict[str, Any]
ImageLike = str | Path | Image.Image | np.ndarray
# int: the longest edge; (short, long): the shortest edge, unless the longest would pass `long`;
# None: as it is
Size = int | Sequence[int] | None


def load_image(path: str | Path) -> np.ndarray:
    """An image file as uint8 [H, W, 3] RGB, turned as its EXIF tag says.

    Raises FileNotFoundError or ValueError, naming the file, if it is missing or can't be decoded.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not an image" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"image {path} {what}")
    try:
        return np.ascontiguousarray(detection_utils.read_image(str(path), format="RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"image {path} can't be read ({error}): the file may be corrupt or truncated; "
            "replace or remove it"
        ) from error


def as_array(image: ImageLike) -> np.ndarray:
    """uint8 [H, W, 3] RGB; files and PIL images are turned as their EXIF tag says.

    Raises FileNotFoundError or ValueError, naming the file or what is wrong with the array.
    """
    if isinstance(image, str | Path):
        return load_image(image)
    if isinstance(image, Image.Image):
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"an image must be a path, a PIL image or a numpy array, not {type(image).__name__}"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(
            "an image array must be RGB, uint8 [height, width, 3], not "
            f"{image.dtype} {list(image.shape)}"
        )
    return image


def read_image(record: Record) -> np.ndarray:
    """The image of a data set's record; raises as `load_image` does, and ValueError if it is not
    of the size that the record states."""
    path = record["file_name"]
    try:
        image = load_image(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}: check the data set's image folder (image_root)"
        ) from None
    height, width = image.shape[:2]
    if (height, width) != (record.get("height", height), record.get("width", width)):
        raise ValueError(
            f"image {path!r} is {width} x {height} (width x height), but its annotation says "
            f"{record['width']} x {record['height']}: its boxes can't be right; correct the "
            "annotation file"
        )
    return image


def resize_transform(height: int, width: int, size: Size) -> T.ResizeTransform:
    """The resizing that `size` asks for, see `TrainMapper`; never to less than one pixel."""
    if size is None or isinstance(size, int):
        scale = 1.0 if size is None else size / max(height, width)
        new_height, new_width = (max(int(edge * scale + 0.5), 1) for edge in (height, width))
    else:
        new_height, new_width = _shortest_edge(height, width, *size)
    return T.ResizeTransform(height, width, new_height, new_width)


def _shortest_edge(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """DETR's rule with the rounding of transformers' processors, so that public weights see the
    very same pixels: the short edge is rounded, the long one cut off."""
    low, high = sorted((height, width))
    exact = min(short, long * low / high) if high * short > long * low else short
    new_low = round(exact)
    new_high = high if new_low == low else int(exact * high / low)
    new_low, new_high = max(new_low, 1), max(new_high, 1)
    return (new_low, new_high) if height <= width else (new_high, new_low)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """[H, W, 3] -> [3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
