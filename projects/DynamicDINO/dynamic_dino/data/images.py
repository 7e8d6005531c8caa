"""Reading and resizing images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from PIL import Image

Record = dict[str, Any]
# int: the longest edge; (short, long): the shortest edge, unless the longest would pass `long`;
# None: as it is
Size = int | Sequence[int] | None


def read_image(record: Record) -> np.ndarray:
    """uint8 [H, W, 3] RGB, turned as its EXIF tag says.

    Raises FileNotFoundError or ValueError, naming the file, if it is missing, can't be decoded or
    is not of the size that the record states.
    """
    path = record["file_name"]
    try:
        image = detection_utils.read_image(path, format="RGB")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"image {path!r} does not exist: check the data set's image folder (image_root)"
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"image {path!r} can't be read ({error}): the file may be corrupt or truncated; "
            "replace it or remove it from the annotation file"
        ) from error
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
    if size is None:
        scale = 1.0
    elif isinstance(size, int):
        scale = size / max(height, width)
    else:
        short, long = size
        scale = min(short / min(height, width), long / max(height, width))
    new_height, new_width = (max(int(edge * scale + 0.5), 1) for edge in (height, width))
    return T.ResizeTransform(height, width, new_height, new_width)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """[H, W, 3] -> [3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
