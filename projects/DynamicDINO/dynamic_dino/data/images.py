"""Reading and resizing images: the one reader, for detection, training and pictures."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import transforms as T
from PIL import Image, UnidentifiedImageError

from .file_kinds import what_it_is
from .image_files import FORMATS, MAX_PIXELS, is_address, most_pixels, shorten
from .jpeg import pixels_of_jpeg
from .pixels import orientation, pixels_of_array, pixels_of_image, seen_size, turned
from .stored import stored_bytes
from .whereabouts import why_missing

Record = dict[str, Any]
ImageLike = str | Path | Image.Image | np.ndarray
# What Pillow raises for a file that can't be right: RuntimeError and EOFError for AVIF and HEIC,
# MemoryError where a damaged length asks for more than there is.
DAMAGES = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
DAMAGES += (RuntimeError, EOFError, MemoryError)
# int: the longest edge; (short, long): the shortest edge, unless the longest would pass `long`;
# None: as it is
Size = int | Sequence[int] | None


class TooManyPixelsError(ValueError):
    """An image has more pixels than are allowed; they weren't decoded."""


def as_array(image: ImageLike) -> np.ndarray:
    """What a person sees of an image file, a PIL image or an array: uint8 [H, W, 3] RGB; see
    `pixels`. Files and PIL images are turned as their EXIF tag says.

    Raises FileNotFoundError or ValueError, naming the file, or the mode or the dtype and shape.
    """
    if isinstance(image, str | Path):
        return load_image(image)
    if isinstance(image, Image.Image):
        return _decoded(image, str(getattr(image, "filename", "") or "(a PIL image)"))
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"an image must be a path, a PIL image or a numpy array, not {type(image).__name__}"
        )
    return pixels_of_array(image)


def load_image(path: str | Path) -> np.ndarray:
    """An image file as uint8 [H, W, 3] RGB, see `as_array`.

    Raises FileNotFoundError or ValueError, naming the file, if it is missing or can't be decoded.
    """
    with open_image(path) as image:
        return _decoded(image, str(path))


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of what `load_image` reads, from the head of the file; raises as it does."""
    with open_image(path) as image:
        try:
            return seen_size(image)
        except DAMAGES as error:
            raise _unreadable(str(path), error) from error


def open_image(given: str | Path) -> Image.Image:
    """An image file, opened and not yet decoded: of a format that is read here, and of no more
    pixels than `most_pixels`. All files are opened by this or by `open_bytes`.

    Raises FileNotFoundError or ValueError, naming the file.
    """
    path = Path(given)
    if not os.path.isfile(path):
        if is_address(given):
            what = "is an address, not a file: download the image and give its path"
        else:
            what = "is a folder, not an image" if os.path.isdir(path) else "does not exist"
        raise FileNotFoundError(f"image {shorten(given)} {what}")
    return _open(path, str(path))


def open_bytes(content: bytes, name: str, most: int | None = None) -> Image.Image:
    """`open_image` of a file in memory; `as_array` decodes it.

    Args:
        name: what errors call it, here and there.
        most: pixels, in place of `most_pixels`; see `allow_in_pillow`.

    Raises ValueError if it can't be read, `TooManyPixelsError` among them.
    """
    image = _open(io.BytesIO(content), name, most)
    image.filename = name
    return image


def _open(file: Path | io.BytesIO, name: str, most: int | None = None) -> Image.Image:
    remedy = ""
    if most is None:
        most = most_pixels()
        remedy = (
            ": make it smaller, or allow more with the environment variable "
            f"{MAX_PIXELS} (in millions)"
        )
    too_large = f"than {most / 1e6:g} million{remedy}"
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:  # of more than Pillow lets through
        raise TooManyPixelsError(f"image {name} has more pixels {too_large}") from None
    except UnidentifiedImageError as error:
        with file.open("rb") if isinstance(file, Path) else file as stream:
            kind, remedy = what_it_is(stream)
        if kind:
            raise ValueError(f"image {name} can't be read, it is {kind}: {remedy}") from error
        raise _unreadable(name, "no image format is recognized") from error
    except DAMAGES as error:
        raise _unreadable(name, error) from error
    if image.width * image.height > most:
        size = f"{image.width} x {image.height}"
        image.close()
        raise TooManyPixelsError(f"image {name} has {size} pixels, more {too_large}")
    return image


def _decoded(image: Image.Image, name: str) -> np.ndarray:
    pixels = pixels_of_jpeg(image)
    if pixels is not None:
        return turned(pixels, orientation(image))
    try:
        image.load()
    except DAMAGES as error:
        raise _unreadable(name, error) from error
    try:
        return pixels_of_image(image)
    except ValueError as error:
        raise ValueError(f"image {name}: {error}") from error


def _unreadable(name: str, error: Exception | str) -> ValueError:
    reason = str(error) or type(error).__name__  # a MemoryError says nothing
    return ValueError(
        f"image {name} can't be read ({reason}): the file may be corrupt or truncated; replace or "
        "remove it"
    )


def read_image(record: Record) -> np.ndarray:
    """The image of a data set's record; raises as `load_image` does, and ValueError if it is not
    of the size that the record states."""
    path = record["file_name"]
    if os.path.exists(path):
        image = load_image(path)
    elif (content := stored_bytes(path)) is not None:
        image = as_array(open_bytes(content, path))
    else:
        raise FileNotFoundError(why_missing(path))
    height, width = image.shape[:2]
    stated = record.get("width", width), record.get("height", height)
    if stated != (width, height):
        raise ValueError(_wrong_size(path, (width, height), stated))
    return image


def _wrong_size(path: str, size: tuple[int, int], stated: tuple[int, int]) -> str:
    what = (
        f"image {path!r} is {size[0]} x {size[1]} (width x height), but its annotation says "
        f"{stated[0]} x {stated[1]}"
    )
    if stated != size[::-1]:
        return f"{what}: its boxes can't be right; correct the annotation file"
    content = None if os.path.exists(path) else stored_bytes(path)
    with open_image(path) if content is None else open_bytes(content, path) as image:
        turn = orientation(image)
    repair = "`python -m dynamic_dino.data convert IN OUT --to coco --sizes-of-images` does it"
    if turn < 5:
        return f"{what}: width and height are swapped; exchange them ({repair})"
    return (
        f"{what}, swapped: the size before its EXIF tag (orientation {turn}) turns it. If the "
        "boxes are those of the picture as it is seen (Label Studio's are), exchange width and "
        f"height ({repair}); if they are of the picture as it is stored, remove the tag from the "
        "image file"
    )


def resize_transform(height: int, width: int, size: Size) -> T.ResizeTransform:
    """The resizing that `size` asks for, see `TrainMapper`; never to less than one pixel.

    By Pillow. PyTorch's resizing takes a third of the time, but has weights of 15 bits, not 22: of
    1200 pictures 7 had a value that was 2 off, and AP of nano-x16 on 90 photos was 5.27, not 5.32.
    """
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
