"""Where files are; and writing results: find out early that it is impossible, never leave half a
file, outlive a full disk, and have one writer in a folder."""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .remote import address

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parent


def writable_folder(folder: str | Path, remedy: str) -> Path:
    """Creates the folder; raises OSError with the remedy where no file can be written into it."""
    if url := address(folder):
        raise OSError(f"can't write to {url}, only train.output_dir may be an address: {remedy}")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"can't write to {folder} ({error.strerror}): {remedy}") from None
    return folder


class DiskFullError(OSError):
    """A file can't be written for want of room, and what was there before is as it was; the message
    names the file, and says what it takes and what is free."""


def disk_full(path: Path, needed: int, reason: str | None = None) -> DiskFullError:
    """The error of a file of `needed` bytes or, where that isn't known, of more than these."""
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(folder).free
    return DiskFullError(
        f"{path} can't be written: it takes {_amount(needed)}, {_amount(free)} are free "
        f"({reason or os.strerror(errno.ENOSPC)})"
    )


def _amount(size: int) -> str:
    return f"{size:,} bytes" if size < 100_000 else f"{size / 1e6:,.1f} MB"


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def partial_name(path: Path) -> Path:
    """The name, beside it, of a file or folder that isn't whole yet; nobody else writes to it."""
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(3)}.partial")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all: an interruption leaves the previous file. Raises `DiskFullError`."""
    with written_whole(path, needed=len(text.encode())) as file:
        file.write(text)


@contextmanager
def written_whole(path: Path, binary: bool = False, needed: int = 0) -> Iterator[IO]:
    """A file to write to, of text (UTF-8) or bytes. `path` changes when all is on the disk, not
    before: whoever reads it, even after a crash, sees the old file or the new one, whole, also
    where two processes write it at the same time.

    Raises `DiskFullError`, before anything is written where fewer than the bytes that are `needed`
    are free, if that is known.
    """
    partial = partial_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if needed > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with partial.open("wb") if binary else partial.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if not _is_full(error) or isinstance(error, DiskFullError):
            raise
        written = partial.stat().st_size if partial.exists() else 0
        partial.unlink(missing_ok=True)  # it takes room that others need, and is counted as free
        raise disk_full(path, max(needed, written), error.strerror) from None
    finally:
        partial.unlink(missing_ok=True)


class LogFile:
    """A text file (UTF-8) that lines are added to. A full disk doesn't end what it is the log of:
    lines that there is no room for are kept, which a warning says once, and written when there is.

    Args:
        durable: what was written outlives the machine too, not just the process.

    Raises `DiskFullError` where there is no room for a file; later, `settle` and `close` do.
    """

    def __init__(self, path: Path, mode: str = "a", durable: bool = False) -> None:
        self.path, self.durable = path, durable
        try:
            self._file = path.open(f"{mode}b", buffering=0)
        except OSError as error:
            if _is_full(error):
                raise disk_full(path, 0, error.strerror) from None
            raise
        self._left: deque[bytes] = deque()  # several threads may add to it
        self._warned = False

    def write(self, text: str | bytes) -> None:
        """Bytes are written as they are."""
        if isinstance(text, str):
            text = text.encode("utf-8", "backslashreplace")
        self._left.append(text)

    def flush(self) -> None:
        part = b""
        try:
            while self._left:
                part = self._left.popleft()
                part = part[self._file.write(part) :]
                if part:
                    self._left.appendleft(part)
            if self.durable:
                os.fsync(self._file.fileno())
            self._warned = False
        except IndexError:  # another thread was faster
            pass
        except OSError as error:
            if part:
                self._left.appendleft(part)
            if not self._warned:
                self._warned = True  # before the warning, which may come here itself
                what = disk_full(self.path, self._size(), error.strerror)
                logger.warning("%s. It is kept until there is room, and all else goes on", what)

    def settle(self) -> None:
        """Writes what is left; raises `DiskFullError` where there still is no room for it."""
        self.flush()
        if self._left:
            raise disk_full(self.path, self._size())

    def close(self) -> None:
        try:
            self.settle()
        finally:
            self._file.close()

    def _size(self) -> int:
        return sum(map(len, self._left))


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
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
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
