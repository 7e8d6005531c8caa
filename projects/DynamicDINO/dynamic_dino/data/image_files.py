"""Which files are pictures, and the pictures of folders and patterns."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

# Formats of photos and drawings. Of them, what this Pillow opens is taken, wherever it comes from:
# a folder, a pattern or an annotation.
_PHOTOS = "jpg jpeg jpe jfif mpo png apng webp avif bmp dib gif tif tiff ppm pgm pbm pnm jp2 j2k"
SUFFIXES = tuple(
    f".{name}" for name in _PHOTOS.split() if f".{name}" in Image.registered_extensions()
)


def files_under(folder: Path) -> Iterator[Path]:
    """All files, in the order of their names, also behind links, but none of hidden folders."""
    seen = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = {name: os.path.realpath(os.path.join(parent, name)) for name in folders}
        folders[:] = [n for n in sorted(folders) if not n.startswith(".") and real[n] not in seen]
        seen.update(real[name] for name in folders)
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(parent, name)


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Files, the images of folders, and what matches patterns ("photos/**/*.jpg"), each once.

    Raises FileNotFoundError for a path that names nothing.
    """
    found: dict[Path, Path] = {}
    for given in paths:
        path = Path(given)
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            matches = [p for p in sorted(path.iterdir()) if is_picture(p)]
        else:
            matches = [Path(p) for p in sorted(glob.glob(str(given), recursive=True))]
            matches = [p for p in matches if is_picture(p)]
        if not matches:
            what = "contains no image" if path.is_dir() else "does not exist"
            if glob.has_magic(str(given)) and not path.exists():
                what = "matches no image"
            raise FileNotFoundError(f"{given} {what}")
        for match in matches:
            found.setdefault(match.resolve(), match)
    return list(found.values())
