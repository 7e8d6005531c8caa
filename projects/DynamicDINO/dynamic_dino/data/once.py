"""What a process reads of files once, and again only if they look changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TypeVar

Content = TypeVar("Content")

_kept: dict[Hashable, tuple[list, object]] = {}


def read_once(what: Hashable, files: Sequence[Path], read: Callable[[], Content]) -> Content:
    """``read()``, or what it returned before under the name `what`, if the files are the same by
    their path, size, time and inode. It is one object, which nobody may change. What raises isn't
    kept, nor is what is read of files that there aren't."""
    if not files or not all(file.is_file() for file in files):
        return read()
    found = [file.stat() for file in files]
    looks = [
        (str(f), s.st_size, s.st_mtime_ns, s.st_ino) for f, s in zip(files, found, strict=True)
    ]
    if what not in _kept or _kept[what][0] != looks:
        _kept.pop(what, None)  # before the other is read: two may not fit
        _kept[what] = looks, read()
    return _kept[what][1]  # type: ignore[return-value]
