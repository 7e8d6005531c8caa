"""Finding the picture that an annotation means, and its size."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

from ..image_files import files_under, is_picture, is_unread_picture
from ..images import image_size
from ..problems import DataError
from ..whereabouts import BESIDE, common_end, image_folders


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file, turned as its EXIF tag says; raises DataError."""
    try:
        return image_size(path)
    except (FileNotFoundError, ValueError) as error:
        raise DataError("bad image", str(error)) from None


class Pictures:
    """The image files of a data set. `root`: where they are, file names are relative to it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def _below(self) -> list[Path]:
        """Below the root, also those of formats that aren't read."""
        files = files_under(self.root)
        return [path for path in files if is_picture(path) or is_unread_picture(path)]

    @cached_property
    def all(self) -> list[Path]:
        """Those below the root, else those of folders such as images/ beside it."""
        return [path for path in self._below if is_picture(path)] or self._beside

    @cached_property
    def unread(self) -> list[Path]:
        """Pictures below the root whose format isn't read here, such as HEIC."""
        return [path for path in self._below if is_unread_picture(path)]

    @cached_property
    def _beside(self) -> list[Path]:
        root = self.root.absolute()
        if root.name.lower() in BESIDE:
            return []
        folders = image_folders(root.parent)
        return [path for f in folders for path in files_under(f) if is_picture(path)]

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        return self._group(lambda path: path.name)

    @cached_property
    def _by_stem(self) -> dict[str, list[Path]]:
        return self._group(lambda path: path.stem)

    def _group(self, key: Callable[[Path], str]) -> dict[str, list[Path]]:
        groups: dict[str, list[Path]] = {}
        for path in dict.fromkeys([*self.all, *self._beside]):
            groups.setdefault(key(path).casefold(), []).append(path)
        for path in self.unread:  # whoever reads it says what it is
            groups.setdefault(key(path).casefold(), [path])
        return groups

    def find(self, hints: Iterable[str], near: Path) -> Path | None:
        """The file of the first hint that there is: a path as the annotation has it, of this or of
        another machine. `near` is the annotation file. Raises DataError if several may be meant."""
        for hint in hints:
            hint = hint.replace("\\", "/")
            for base in (near.parent, self.root):
                if hint and os.path.isfile(base / hint):
                    return Path(os.path.normpath(base / hint))
            found = self._by_name.get(hint.rsplit("/", 1)[-1].casefold())
            if found:
                return _best(found, hint, near)
        return None

    def of_stem(self, near: Path) -> Path | None:
        """The file of the same name as the annotation file, but for the ending."""
        found = self._by_stem.get(near.stem.casefold())
        return _best(found, near.stem, near) if found else None

    def relative(self, path: Path) -> str:
        """As a record names it: relative to `root`, or whole where it isn't in there."""
        if path.is_relative_to(self.root):
            return path.relative_to(self.root).as_posix()
        return str(path.absolute())


def _best(found: list[Path], hint: str, near: Path) -> Path:
    """Of several files of one name, in whatever case, that with the very name, then with the most
    folders in common with the hint, then with the annotation file."""
    if len(found) == 1:
        return found[0]
    *folders, name = hint.split("/")

    def alike(path: Path) -> tuple[bool, int, int]:
        return (
            name in (path.name, path.stem),
            common_end(path.parts[:-1], folders),
            len(set(path.parent.parts) & set(near.parent.parts)),
        )

    best = max(map(alike, found))
    first, *others = [path for path in found if alike(path) == best]
    if others:
        what = f"several images may be meant, {first} and {others[0]}: give them names of their own"
        raise DataError("ambiguous image", what)
    return first
