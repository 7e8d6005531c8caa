"""Where files are; and writing results: find out early that it is impossible, and never leave half
a file."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

PACKAGE = Path(__file__).resolve().parent


def writable_folder(folder: str | Path, remedy: str) -> Path:
    """Creates the folder; raises OSError with the remedy where no file can be written into it."""
    folder = Path(folder)
    try:
        probe_folder(folder)
    except OSError as error:
        raise OSError(f"can't write to {folder} ({error.strerror}): {remedy}") from None
    return folder


def probe_folder(folder: Path) -> None:
    """Creates the folder and tries to write into it; raises the OSError that this meets."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_text(path: Path, text: str) -> None:
    """Whole or not at all: an interruption leaves the previous file."""
    with written_whole(path) as file:
        file.write(text)


@contextmanager
def written_whole(path: Path, binary: bool = False) -> Iterator[IO]:
    """A file to write to, of text (UTF-8) or bytes. `path` changes when all is on the disk, not
    before: whoever reads it, even after a crash, sees the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") if binary else partial.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sha256_of_file(path: Path) -> str:
    """In hexadecimal digits; the file may be larger than memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def configs_folder() -> Path:
    """Where the recipes are: in the package if it was installed, else in the checkout."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parents[2] / "configs"
