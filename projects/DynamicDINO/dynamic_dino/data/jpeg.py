"""JPEG files by torchvision: the pixels that Pillow gives, in two thirds of the time.

Both have libjpeg-turbo; what Pillow decodes is copied thrice until it is an array.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg


def pixels_of_jpeg(image: Image.Image) -> np.ndarray | None:
    """uint8 [H, W, 3] RGB of a gray or RGB JPEG file that was opened and not decoded, as it lies in
    the file, whatever its EXIF tag says.

    None for everything else, also for what torchvision can't decode: Pillow knows more kinds, and
    says what is wrong with a file.
    """
    file = getattr(image, "fp", None)
    if image.format != "JPEG" or image.mode not in ("L", "RGB") or not file or not image.tile:
        return None
    place = file.tell()
    try:
        file.seek(0)
        content = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
        pixels = decode_jpeg(content, mode=ImageReadMode.RGB).permute(1, 2, 0)
    except (RuntimeError, ValueError, OSError):
        return None
    finally:
        file.seek(place)
    asked = (image.height, image.width)  # Image.draft asks for less than there is
    return np.ascontiguousarray(pixels.numpy()) if tuple(pixels.shape[:2]) == asked else None
