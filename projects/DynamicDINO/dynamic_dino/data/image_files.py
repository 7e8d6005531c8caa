"""Which files are pictures, and the pictures of folders and patterns."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

with suppress(ImportError):
    import pillow_heif  # the extra "heic"

    pillow_heif.register_heif_opener()

# The formats that are read, wherever a file comes from: a folder, a pattern, an annotation; those
# of them that this Pillow opens.
_ALLOWED = "JPEG MPO PNG WEBP AVIF HEIF GIF BMP DIB TIFF PPM JPEG2000 TGA"
Image.init()
FORMATS = tuple(name for name in _ALLOWED.split() if name in Image.OPEN)
SUFFIXES = tuple(
    sorted(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)
)
# A picture of few bytes may have so many pixels that decoding them fills the memory, at about 14
# bytes a pixel.
MAX_PIXELS = "DYNAMIC_DINO_MAX_PIXELS"


def most_pixels() -> int:
    """How many pixels an image file may have; raises ValueError where the variable is no number."""
    text = os.environ.get(MAX_PIXELS, "128")
    if not re.fullmatch(r"\d{1,6}(\.\d*)?", text) or not float(text):
        raise ValueError(f"{MAX_PIXELS}={text}: it needs a number of millions of pixels, as 128")
    return int(float(text) * 1e6)


def allow_in_pillow(pixels: int) -> None:
    """Whoever allows so many means Pillow's own limit too, from which on it warns, and refuses
    twice as many."""
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, pixels)


with suppress(ValueError):  # said when a picture is opened
    if MAX_PIXELS in os.environ:
        allow_in_pillow(most_pixels())

# Pictures to a person, whether they are read here or not.
_OTHERS = ".heic .heif .hif .avif .jxl .svg .psd .eps .ico .dng .cr2 .cr3 .nef .arw .raf .orf"
UNREAD_SUFFIXES = tuple(suffix for suffix in _OTHERS.split() if suffix not in SUFFIXES)


def is_picture(path: Path) -> bool:
    """By its name. Hidden files are none, such as the ._photo.jpg that macOS leaves behind."""
    return path.suffix.lower() in SUFFIXES and not is_hidden(path)


def is_unread_picture(path: Path) -> bool:
    """By its name, a picture of a format that isn't read here."""
    return path.suffix.lower() in UNREAD_SUFFIXES and not is_hidden(path)


def unread_remedy(path: Path) -> str:
    """What to do about such a picture."""
    if path.suffix.lower() in (".heic", ".heif", ".hif"):
        return "pip install pillow-heif, which reads HEIC, or convert it to JPEG"
    return "convert it to JPEG or PNG"


def is_address(name: str | Path) -> bool:
    """Whether it is a URL, such as http://..., s3://... or data:..., also where a path has lost a
    slash."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/|data:", str(name)) is not None


def shorten(name: str | Path) -> str:
    """As it is shown: some are whole pictures."""
    return str(name) if len(str(name)) < 300 else f"{str(name)[:100]}..."


def is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def files_under(folder: Path) -> Iterator[Path]:
    """All files, in the order of their names, also behind links, but none that is hidden or in a
    hidden folder."""
    seen = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = {name: os.path.realpath(os.path.join(parent, name)) for name in folders}
        folders[:] = [n for n in sorted(folders) if not n.startswith(".") and real[n] not in seen]
        seen.update(real[name] for name in folders)
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(parent, name)


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Files, as often as they are named, and the images of folders and patterns ("photos/**/*.jpg")
    that aren't among them already. Links are files of their own.

    Raises FileNotFoundError for a path that names nothing.
    """
    return search_images(paths)[0]


def search_images(
    paths: Sequence[str | Path], wanted: Callable[[Path], bool] = is_picture
) -> tuple[list[Path], list[Path]]:
    """What `find_images` finds, and what it leaves out: other files of the folders and patterns,
    and folders in the folders; nothing that is hidden. A file that is named is taken as it is.

    wanted  which files of folders and patterns are taken, by their names
    """
    taken: list[Path] = []
    others: dict[str, Path] = {}
    for given in paths:
        path = Path(given)
        if os.path.isfile(path):  # False, not an error, for a path that can't be
            taken.append(path)
            continue
        if os.path.isdir(path):
            matches, left = _sorted_out(sorted(path.iterdir()), wanted)
        else:
            found = sorted(glob.glob(str(given), recursive=True))
            matches, left = _sorted_out(map(Path, found), wanted)
            left = [p for p in left if p.is_file()]
        if not matches:
            raise FileNotFoundError(_nothing_found(given))
        others.update((os.path.abspath(p), p) for p in left)
        known = {os.path.abspath(p) for p in taken}
        taken += [p for p in matches if os.path.abspath(p) not in known]
    known = {os.path.abspath(p) for p in taken}
    return taken, [p for place, p in others.items() if place not in known]


def left_out(paths: Sequence[Path]) -> str:
    """One line about what `search_images` left out, "" for nothing."""
    kinds: dict[str, list[Path]] = {}
    for path in paths:
        kind = "folder" if path.is_dir() else path.suffix.lower() or "without an ending"
        kinds.setdefault(kind, []).append(path)
    if not kinds:
        return ""
    parts = []
    for kind, these in sorted(kinds.items()):
        names = ", ".join(path.name for path in these[:3]) + (", ..." if len(these) > 3 else "")
        parts.append(f"{len(these):,} {kind} ({names}{_how_to_read(these[0])})")
    return "left out: " + ", ".join(parts)


def _sorted_out(
    paths: Iterable[Path], wanted: Callable[[Path], bool] = is_picture
) -> tuple[list[Path], list[Path]]:
    """(pictures, everything else that isn't hidden)"""
    pictures, others = [], []
    for path in paths:
        if wanted(path) and not path.is_dir():  # a broken link is one, and an error later
            pictures.append(path)
        elif not is_hidden(path):
            others.append(path)
    return pictures, others


def _how_to_read(path: Path) -> str:
    if path.is_dir():
        return f"; '{path}/**/*' takes the images in it"
    return f"; {unread_remedy(path)}" if is_unread_picture(path) else ""


def _nothing_found(given: str | Path) -> str:
    """What is wrong with a path that names no image, and what to do."""
    if is_address(given):
        return f"{shorten(given)} is an address, not a file: download the image and give its path"
    path = Path(given)
    if os.path.isdir(path):
        others = left_out(_sorted_out(sorted(path.iterdir()))[1])
        return f"{given} contains no image" + (f" ({others})" if others else "")
    if glob.has_magic(str(given)):
        return f"{given} matches no image"
    slashes = Path(str(given).replace("\\", "/"))
    hint = f"; {slashes} does: write slashes" if os.path.exists(slashes) else ""
    return f"{shorten(given)} does not exist{hint}"
