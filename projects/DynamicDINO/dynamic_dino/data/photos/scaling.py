"""Photos as they are kept: JPEG, the longest side at most `LONGEST` pixels."""

from __future__ import annotations

from pathlib import Path

import cv2

from ...files import written_whole
from ..images import DAMAGES, open_bytes
from ..pixels import pixels_of_image
from .sets import PhotosError

LONGEST = 480
QUALITY = 92


def scaled_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) after scaling."""
    factor = min(1.0, LONGEST / max(width, height))
    return max(round(width * factor), 1), max(round(height * factor), 1)


def write_scaled(path: Path, content: bytes, width: int, height: int, where: str) -> None:
    """Writes a picture file as a JPEG file of `scaled_size`, whole or not at all.

    Raises `PhotosError` if it isn't a picture of the size that its annotations say.
    """
    try:
        with open_bytes(content, where) as image:
            pixels = pixels_of_image(image, turn=False)  # boxes lie in the stored picture
    except DAMAGES:
        raise PhotosError(f"{where} is no picture: fetch it again") from None
    if pixels.shape[:2] != (height, width):
        raise PhotosError(
            f"{where} is {pixels.shape[1]} x {pixels.shape[0]}, the annotations say "
            f"{width} x {height}"
        )
    size = scaled_size(width, height)
    if size != (width, height):
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    jpeg = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
    with written_whole(path, binary=True) as file:
        file.write(jpeg.tobytes())
