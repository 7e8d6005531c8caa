"""Where images are that don't lie where an annotation file says.

The file was written elsewhere: on Windows, on another machine, for a web server, or for another
folder to start from. So the end of a path is what is known of it, and it is looked for under the
image folder and the folders where tools put images.
"""

from __future__ import annotations

import copy
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .image_files import is_address, is_picture, is_unread_picture, shorten
from .records import Records, Texts

# Where tools put pictures when annotations have a folder of their own.
BESIDE = ("images", "jpegimages", "img", "imgs", "pictures", "photos")
DRIVE = re.compile(r"[A-Za-z]:[\\/]")
LONGEST = 1024  # characters of a path; what is longer is the picture itself, as text
TRIES = 3  # files of each folder that are looked for
REMEDY = (
    "name the folder of the images (--image-folder FOLDER; in training data.train_images=FOLDER or "
    "data.val_images=FOLDER), add the file, or remove the annotation"
)


def find_path(name: str, folder: Path) -> Path | None:
    """The file or folder that is called `name` as seen from `folder`; None if there is none.

    As it is said, else the longest end of the path that exists: under `folder` and its folders of
    images, then under the folder above and its folders of images.
    """
    if len(name) > LONGEST:
        return None
    path = _in_slashes(name)
    if os.path.exists(folder / path):  # False, not an error, for a path that can't be
        return folder / path
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    places = [folder, *image_folders(folder), folder.parent, *image_folders(folder.parent)]
    for start in range(len(parts)):
        for place in places:
            found = place.joinpath(*parts[start:])
            if os.path.exists(found):
                return found
    return None


def with_found_images(records: Records) -> tuple[Records, list[str]]:
    """The records with the names of files that exist, and what was found elsewhere, in words.

    Files that the annotations have in one folder lie in one folder, so that some of each are looked
    for; a folder stays if one of them is there. Where two names would become one file, nothing is
    changed.
    """
    root = Path(os.path.abspath(records.image_root))
    if not os.path.isdir(root):
        return records, []
    moved: dict[str, str] = {}  # folder as the annotations have it -> as it is
    tries: Counter[str] = Counter()
    for name in records.names:
        folder = _split(name)[0]
        if tries[folder] >= TRIES:
            continue
        tries[folder] += 1
        if os.path.isfile(os.path.join(root, name)):
            moved[folder] = folder
            tries[folder] = TRIES
        elif folder not in moved and (found := find_path(name, root)) and os.path.isfile(found):
            moved[folder] = _relative(found.parent, root)
    changed = {old: new for old, new in moved.items() if old != new}
    if not changed:
        return records, []
    names = []
    for name in records.names:
        folder, file = _split(name)
        names.append(changed[folder] + file if folder in changed else name)
    if len(set(names)) < len(set(records.names)):
        return records, []
    renamed = copy.copy(records)
    renamed.names = Texts.of(names)
    return renamed, [
        f"images{f' of {old!r}' if old else ''} found in {os.path.normpath(root / new)}"
        for old, new in changed.items()
    ]


def why_missing(name: str | Path, root: Path = Path()) -> str:
    """What is wrong with the path of an image that doesn't exist, seen from `root`, and what to do:
    a sentence."""
    path = root / name
    folder = next((folder for folder in path.parents if os.path.isdir(folder)), root)
    rest = os.path.relpath(path, folder)
    shown = name if is_address(name) else os.path.join(root, name)
    what = f"image {shorten(shown)} does not exist"
    if is_address(rest):
        what += ", its annotation has an address: download the images"
    elif "\\" in rest or DRIVE.match(rest):
        what += ", its annotation has a path of Windows"
    elif path.parent != folder:
        what += f", there is no folder {folder / Path(rest).parts[0]}"
    if found := find_path(rest, folder) or _nearly(rest, folder):
        what += f"; there is {os.path.normpath(found)}"
    return f"{what}: {REMEDY}"


def _nearly(name: str, folder: Path) -> Path | None:
    """The picture of the same name but for capitals and the ending."""
    stem = Path(_in_slashes(name)).stem.casefold()
    pictures = (p for p in sorted(folder.iterdir()) if is_picture(p) or is_unread_picture(p))
    return next((path for path in pictures if path.stem.casefold() == stem), None)


def _split(name: str) -> tuple[str, str]:
    """(folder as it stands there, up to the last slash, name of the file)"""
    if "\\" not in name and ":" not in name:  # nearly all
        cut = name.rfind("/") + 1
        return name[:cut], name[cut:]
    path = name.partition("?")[0] if is_address(name) else name
    folder = path[: max(path.rfind("/"), path.rfind("\\")) + 1]
    return folder, _in_slashes(name).rpartition("/")[2]


def _in_slashes(name: str) -> str:
    """A path with slashes, without the host of an address or the drive of Windows."""
    if is_address(name):
        return unquote(urlsplit(re.sub(r":/+", "://", name, count=1)).path).lstrip("/")
    if DRIVE.match(name):
        name = name[2:].lstrip("\\/")
    return name.replace("\\", "/")


def common_end(a: Sequence[str], b: Sequence[str]) -> int:
    """How many last parts of two paths are equal."""
    pairs = zip(reversed(a), reversed(b), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def image_folders(folder: Path) -> Iterator[Path]:
    """The folders in it where tools put images."""
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        return
    yield from (path for path in inside if path.name.lower() in BESIDE and path.is_dir())


def _relative(folder: Path, root: Path) -> str:
    """With a slash at its end, relative to the root where that is short."""
    relative = os.path.relpath(folder, root)
    if relative.startswith(os.path.join("..", "..")):
        relative = str(folder)
    return "" if relative == "." else os.path.join(relative, "")
