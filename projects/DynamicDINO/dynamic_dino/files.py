"""Where files are; and writing results: find out early that it is impossible, never leave half a
file, and have one writer in a folder."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

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
    before: whoever reads it, even after a crash, sees the old file or the new one, whole, also
    where two processes write it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(3)}.partial")
    try:
        with partial.open("wb") if binary else partial.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class FolderInUseError(OSError):
    """Another process writes into the folder; the message says which, and since when."""


@contextmanager
def sole_writer(folder: Path, wait: float = 20.0) -> Iterator[None]:
    """This process alone writes into the folder, which is made where needed, meanwhile; one that
    does already may do so again. What a process that was killed left half written is removed.

    The system's lock on FOLDER/.lock decides, which ends with the processes that hold it, whatever
    ends them; FOLDER/running.json tells people who it is. Where that process has ended, or is on
    another machine, up to `wait` seconds are given to those that it left, workers of a loader say.

    Raises `FolderInUseError`.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock, note = FileLock(folder / ".lock", is_singleton=True), folder / "running.json"
    if lock.is_locked:
        yield
        return
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if _is_alive(_noted(note)):
                raise
            lock.acquire(timeout=wait)
    except Timeout:
        holder = _noted(note)
        who = "process {pid} on {host}, since {since},".format(**holder) if holder else "a process"
        raise FolderInUseError(f"{who} writes to {folder}") from None
    except (NotImplementedError, OSError) as error:
        logger.warning("%s can't be locked (%s): start no second run there", folder, error)
        yield
        return
    try:
        if holder := _noted(note):
            logger.warning("%s was left by process %s on %s", folder, holder["pid"], holder["host"])
        for leftover in folder.glob("*.partial"):
            leftover.unlink()
        since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        write_text(note, json.dumps(me) + "\n")
        try:
            yield
        finally:
            note.unlink(missing_ok=True)
    finally:
        lock.release()


def _noted(note: Path) -> dict:
    """Who wrote the note; empty where there is none."""
    with suppress(OSError, ValueError):
        content = json.loads(note.read_text(encoding="utf-8"))
        return {key: content[key] for key in ("pid", "host", "since")}
    return {}


def _is_alive(holder: dict) -> bool:
    """Whether that process is on this machine and runs."""
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        pass
    return True


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
