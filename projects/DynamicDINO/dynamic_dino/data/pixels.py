"""What a person sees of a picture, as 8-bit RGB pixels.

One rule for files, PIL images and arrays, whatever the mode and the depth:

- transparency (an alpha channel, a palette with alpha, a colour key) lies on a white page;
- values of 16 bits give their upper 8, so that 65535 is white, as a viewer shows it;
- numbers without an agreed white (floating point, integers beyond 16 bits) are refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageCms

ORIENTATION = 0x0112  # the EXIF tag; from 5 on, width and height are exchanged
_TURNS = {  # the order in which rows are taken, that of columns; then, whether they are exchanged
    2: (1, -1, False),
    3: (-1, -1, False),
    4: (-1, 1, False),
    5: (1, 1, True),
    6: (-1, 1, True),
    7: (-1, -1, True),
    8: (1, -1, True),
}
_CHANNELS = {1: "gray", 2: "gray and alpha", 3: "RGB", 4: "RGB and alpha"}


def pixels_of_image(image: Image.Image, turn: bool = True) -> np.ndarray:
    """uint8 [H, W, 3] of a PIL image, the frame that it shows; `turn`: as its EXIF tag says.

    Raises ValueError naming a mode that has no agreed colours, and what Pillow raises where the
    data are damaged.
    """
    image.load()  # TIFF files are turned by this, and lose their tag
    pixels = np.array(_as_rgb(image))
    return turned(pixels, orientation(image)) if turn else pixels


def pixels_of_array(array: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of an array of uint8, uint16 or bool: [H, W] or [H, W, 1] gray, [H, W, 2]
    gray and alpha, [H, W, 3] RGB, [H, W, 4] RGB and alpha.

    Raises ValueError naming the dtype and the shape of any other.
    """
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in _CHANNELS or not array.size:
        raise ValueError(f"an image array must be [height, width, 3], RGB, {_not(array)}")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype not in (np.uint8, np.uint16, bool):
        raise ValueError(
            f"an image array must be uint8 or uint16, {_not(array)}: scale it so that white is "
            "255 and convert it; of values from 0 to 1, (image * 255).round().astype(np.uint8)"
        )
    values = _eight_bits(array)
    if values.ndim == 3 and channels == 3:
        return values
    values = values[..., 0] if array.shape[2:] == (1,) else values
    return pixels_of_image(Image.fromarray(np.ascontiguousarray(values)))


def orientation(image: Image.Image) -> int:
    """The EXIF tag of how a picture is turned, 1 (as it is) to 8."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # whatever a damaged tag makes Pillow raise: the picture itself may be good
        return 1


def turned(pixels: np.ndarray, tag: int) -> np.ndarray:
    """[H, W, 3] as `orientation` says that a picture is seen."""
    if tag not in _TURNS:
        return pixels
    rows, columns, exchanged = _TURNS[tag]
    pixels = pixels[::rows, ::columns]
    return np.ascontiguousarray(pixels.transpose(1, 0, 2) if exchanged else pixels)


def seen_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an image that was opened, not loaded, turned as its EXIF tag says."""
    turned = orientation(image) > 4
    if turned and image.format == "TIFF":  # how it states its size depends on Pillow's version
        image.load()
        return image.size
    return image.size[::-1] if turned else image.size


def _as_rgb(image: Image.Image) -> Image.Image:
    mode, shown = image.mode, image
    if mode == "F":
        raise ValueError(
            "mode F holds floating-point numbers, and nothing says which of them is white: "
            "convert it to 8 bits (mode L) first"
        )
    if mode == "LAB":
        return _from_lab(image)
    if mode.startswith("I"):
        shown = Image.fromarray(_eight_bits(_sixteen_bits(np.asarray(image), mode)))
    elif mode == "La":  # as RGBa, colours that are multiplied by alpha; Pillow converts only that
        gray, alpha = image.split()
        shown = Image.merge("RGBa", (gray, gray, gray, alpha))
    key = image.info.get("transparency")
    if isinstance(key, int if len(image.getbands()) == 1 else tuple) and mode not in ("P", "PA"):
        shown = shown.convert("RGB")
        shown.putalpha(Image.fromarray(_differs(np.asarray(image), key)))
    if not shown.has_transparency_data:
        return shown if shown.mode == "RGB" else shown.convert("RGB")
    page = Image.new("RGBA", shown.size, "white")
    page.alpha_composite(shown.convert("RGBA"))
    return page.convert("RGB")


def _from_lab(image: Image.Image) -> Image.Image:
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.applyTransform(image, ImageCms.buildTransform(lab, rgb, "LAB", "RGB"))


def _sixteen_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Pillow reads some 16-bit files as 32-bit integers."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(
            f"mode {mode} holds numbers from {low} to {high}, and nothing says which of them is "
            "white: scale them to 16 bits (0 to 65535) or convert it to 8 bits (mode L) first"
        )
    return values.astype(np.uint16)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint16:
        return (values >> 8).astype(np.uint8)
    return values.astype(np.uint8) * 255 if values.dtype == bool else values


def _differs(values: np.ndarray, key: Any) -> np.ndarray:
    """uint8 [H, W], an alpha channel: 0 where a pixel has the colour that is the key."""
    key = np.asarray(key)
    if values.dtype == bool:
        key = key > 0
    elif values.dtype == np.uint8 and key.max() > 255:  # Pillow gave the upper bits of 16
        key = key >> 8
    same = (values == key) if values.ndim == 2 else (values == key).all(axis=-1)
    return np.where(same, 0, 255).astype(np.uint8)


def _not(array: np.ndarray) -> str:
    return f"not {array.dtype} {list(array.shape)}"
