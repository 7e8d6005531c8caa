"""The pictures in memory: cut-outs with alpha and background photos, decoded once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2
import numpy as np

from .sources import PHOTOS, STAMPS, SourceError, read_deb, read_rcc
from .vocabulary import SPRITE, Vocabulary

CUTOUT_SIDE = 512  # longest side kept in memory, px
BACKGROUND_SIDE = 640
STAMPS_FOLDER = "usr/share/tuxpaint/stamps/"
SPRITES = "lang"  # the resource file of the drawn sprites
# things that lie about at any angle; animals, buildings and vehicles stay upright
ANY_ANGLE = ("food/", "household/tools", "household/arttools", "household/dishes/utensils")
ANY_ANGLE += (
    "household/key",
    "plants/flowers/",
    "medical/",
    "clothes/",
    "sports/",
    "hobbies/music",
)


@dataclass(frozen=True)
class Cutout:
    """One object. ``image``: uint8 [h, w, 4], BGR premultiplied by alpha, and alpha."""

    name: str
    image: np.ndarray
    any_angle: bool = False
    flip: bool = True

    @property
    def drawn(self) -> bool:
        return self.name.startswith(SPRITE)


@dataclass(frozen=True)
class Library:
    """What images are composed of.

    cutouts      name -> Cutout
    backgrounds  "train" and "held_out" -> list of uint8 [h, w, 3] BGR photos
    """

    cutouts: dict[str, Cutout]
    backgrounds: dict[str, list[np.ndarray]]


def shrink(image: np.ndarray, longest: int) -> np.ndarray:
    scale = longest / max(image.shape[:2])
    if scale >= 1:
        return image
    size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def prepare_cutout(image: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 4] BGRA -> cropped to its object, shrunk, premultiplied by alpha.

    Specks apart from the object (under 1% of its largest part) are wiped: they would stretch its
    box.
    """
    alpha = image[..., 3]
    count, labels, stats, _ = cv2.connectedComponentsWithStats((alpha > 64).astype(np.uint8))
    areas = stats[1:, cv2.CC_STAT_AREA]
    if count < 2:
        raise ValueError("the picture is fully transparent")
    keep = np.concatenate([[False], areas >= 0.01 * areas.max()])[labels]
    keep = cv2.dilate(keep.astype(np.uint8), np.ones((5, 5), np.uint8))  # keeps the soft edge
    alpha = np.where(keep > 0, alpha, 0).astype(np.uint8)
    x, y, w, h = cv2.boundingRect((alpha > 64).astype(np.uint8))
    image, alpha = image[y : y + h, x : x + w], alpha[y : y + h, x : x + w]
    colour = cv2.multiply(image[..., :3], cv2.merge([alpha] * 3), scale=1 / 255)
    return shrink(np.dstack([colour, alpha]), CUTOUT_SIDE)


def _decode(content: bytes, name: str, flags: int) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    if image is None:
        raise SourceError(f"{name}: the picture can't be decoded by this OpenCV.")
    return image


def _cutout(name: str, content: bytes, vocabulary: Vocabulary) -> Cutout:
    image = _decode(content, name, cv2.IMREAD_UNCHANGED)
    if image.ndim != 3 or image.shape[2] != 4:
        raise SourceError(f"{name}: has no alpha channel, shape {image.shape}.")
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    return Cutout(
        name, prepare_cutout(image), name.startswith(ANY_ANGLE), name not in vocabulary.no_flip
    )


def load_library(
    debs: dict[str, Path], vocabulary: Vocabulary, exclude: frozenset[str] = frozenset()
) -> tuple[Library, dict[str, bytes]]:
    """Read all pictures that the vocabulary names out of the two packages.

    ``exclude``: file names ("erase/gibbon.webp") of evaluation photos, which are never a
    background. Returns the library and the undecoded content of the excluded photos. Raises
    SourceError if the packages lack anything.
    """
    wanted = {name for name in vocabulary.cutouts if not name.startswith(SPRITE)}
    cutouts = {}
    for path, content in read_deb(debs[STAMPS.name]):
        name = path.removeprefix(STAMPS_FOLDER).removesuffix(".png")
        if path.endswith(".png") and name in wanted:
            cutouts[name] = _cutout(name, content, vocabulary)
    split_of = {name: split for split, names in vocabulary.backgrounds.items() for name in names}
    stems = {name.split("/")[0] for name in [*split_of, *exclude]} | {SPRITES}
    photos, backgrounds = {}, {}
    for path, resource in read_deb(debs[PHOTOS.name]):
        stem = PurePosixPath(path).stem
        if not path.endswith(".rcc") or stem not in stems:
            continue
        for entry, content in read_rcc(resource):
            file = PurePosixPath(entry)
            if file.suffix != ".webp":
                continue
            sprite = SPRITE + file.stem
            if stem == SPRITES and sprite in vocabulary.cutouts:
                cutouts[sprite] = _cutout(sprite, content, vocabulary)
            if f"{stem}/{file.name}" in exclude:
                photos[f"{stem}/{file.name}"] = content
            elif f"{stem}/{file.stem}" in split_of:
                image = _decode(content, str(file), cv2.IMREAD_COLOR)
                backgrounds[f"{stem}/{file.stem}"] = shrink(image, BACKGROUND_SIDE)
    excluded = {name.removesuffix(".webp") for name in exclude}
    missing = sorted(set(vocabulary.cutouts) - set(cutouts))
    missing += sorted(set(split_of) - set(backgrounds) - excluded) + sorted(exclude - set(photos))
    if missing:
        raise SourceError(f"the packages lack {len(missing)} pictures, such as {missing[:3]}.")
    ordered = {
        split: [backgrounds[name] for name in names if name in backgrounds]
        for split, names in vocabulary.backgrounds.items()
    }
    return Library({name: cutouts[name] for name in vocabulary.cutouts}, ordered), photos
