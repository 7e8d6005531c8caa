"""Files at addresses (``s3://``, ``gs://``, ``hf://``, ``https://``), read and written by fsspec:
faults of the network and the server are waited out, and what was read is kept in a cache of limited
size.

Nothing here is met by a local path: whoever reads files looks at the disk first.

DYNAMIC_DINO_CACHE        folder of the cache, by default ``~/.cache/dynamic_dino``
DYNAMIC_DINO_CACHE_GB     how much of it remote files may take, by default 20; what hasn't been read
                          for longest goes first
DYNAMIC_DINO_REMOTE_WAIT  for how many seconds what fails is tried again, by default 300
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

logger = logging.getLogger(__name__)

CACHE = "DYNAMIC_DINO_CACHE"
LIMIT = "DYNAMIC_DINO_CACHE_GB"
WAIT = "DYNAMIC_DINO_REMOTE_WAIT"
_ADDRESS = re.compile(r"(s3|gs|gcs|hf|https?|memory):/+(?=[^/])")
# What another attempt can't change. HTTP's 408 and 429 ask for one.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_FINAL += (ImportError, ValueError, TypeError, AttributeError, NotImplementedError)
# Of what the protocols tell of a file; some keep another set in a listing than for one file.
_MARKS = ("size", "ETag", "etag", "LastModified", "generation", "updated", "created", "last_commit")
_FIRST, _LONGEST = 0.5, 15.0  # seconds between two attempts
_LASTING = 2.0  # seconds after which a fault isn't over in a moment
_written = 0.0  # bytes of small entries since the cache was last measured, by this process
T = TypeVar("T")


class RemoteError(OSError):
    """A remote file can't be read or written; the message names its address and what to do."""


class Version(NamedTuple):
    """What tells whether the file at an address is still the same: `mark` is another one when it
    has been written again."""

    size: int
    mark: str


def address(given: str | Path) -> str | None:
    """The address that this is, also where `Path` has taken one of its slashes; None for a path.
    As a text, "hf:/..." is a directory, see `sources`."""
    match = _ADDRESS.match(str(given))
    if match is None or (isinstance(given, str) and match[0] == "hf:/"):
        return None
    return f"{match[1]}://{str(given)[match.end() :]}"


def exists(url: str) -> bool:
    """Whether a file is there. Raises `RemoteError`."""
    try:
        return not _persistently(url, _is_folder)
    except FileNotFoundError:
        return False


def read(url: str, start: int = 0, size: int | None = None) -> bytes:
    """The content, or `size` bytes from `start` on, from the cache if it was read before: a file is
    taken to stay what it is under its address.

    Raises:
        FileNotFoundError: there is no such file.
        RemoteError: it can't be read, which was tried again for long enough or is no use.
    """
    entry = _entry(f"{url}#{start}+{size}")
    with suppress(OSError):
        content = entry.read_bytes()
        os.utime(entry)
        return content

    def get(fs: Any, path: str) -> bytes:
        if size is None:
            return fs.cat_file(path)
        content = fs.cat_file(path, start=start, end=start + size)
        if len(content) > size:  # a server that knows no ranges
            content = content[start : start + size]
        if len(content) != size:
            raise ConnectionError(f"{len(content)} bytes came instead of {size}")
        return content

    content = _persistently(url, get)
    if _limit():
        with suppress(OSError):  # a full disk: it is read again next time
            _put(entry, lambda partial: partial.write_bytes(content))
            _count(len(content))
    return content


def fetch(url: str, beside: Sequence[str] = ()) -> Path:
    """A local copy of a file, or of a folder with all that is in it, which is renewed when the
    original has changed. Raises as `read` does.

    Args:
        beside: names of further files that are copied too, where they are beside it.
    """
    above = url.rpartition("/")[0]
    urls = [url, *(other for name in beside if exists(other := f"{above}/{name}"))]
    state = [_persistently(each, _state) for each in urls]
    entry = _entry(repr([urls, state]))
    if not entry.is_dir():
        with _locked(entry):
            if not entry.is_dir():
                logger.info("Fetching %s", ", ".join(urls))
                _put(entry, lambda partial: [_copy(each, partial) for each in urls])
                _trim()
    os.utime(entry)
    return entry / _file_name(url)


def listing(url: str) -> dict[str, Version]:
    """The files of a folder, by their paths in it; none where there is no such folder. Raises
    `RemoteError`."""

    def find(fs: Any, path: str) -> dict[str, Version]:
        fs.invalidate_cache()
        above = f"{path.rstrip('/')}/"
        found = {
            name.removeprefix(above): Version(
                int(info.get("size") or 0), repr([info[key] for key in _MARKS if key in info])
            )
            for name, info in fs.find(path, detail=True).items()
            if name.startswith(above)
        }
        # An object's name can be any text; these would lie elsewhere on a disk.
        return {name: found[name] for name in found if {"", ".", ".."}.isdisjoint(name.split("/"))}

    try:
        return _persistently(url, find)
    except FileNotFoundError:
        return {}


def download(url: str, path: Path) -> None:
    """`path` becomes the file, or stays what it is. Raises as `read` does."""
    _put(path, lambda partial: _persistently(url, lambda fs, p: fs.get_file(p, str(partial))))


def upload(content: Path | bytes, url: str) -> None:
    """Object storage has the file then, or what was there before. Raises as `read` does."""

    def put(fs: Any, path: str) -> None:
        if isinstance(content, bytes):
            fs.pipe_file(path, content)
        else:
            fs.put_file(str(content), path)

    _persistently(url, put, "written")


def remove(url: str) -> None:
    """Also where it is gone already. Raises `RemoteError`."""
    with suppress(FileNotFoundError):
        _persistently(url, lambda fs, path: fs.rm_file(path), "removed")


def cache_root() -> Path:
    """Where records and remote files are kept."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE) or Path(caches) / "dynamic_dino")


def _number(variable: str, default: float) -> float:
    text = os.environ.get(variable, "") or str(default)
    if not re.fullmatch(r"\d{1,9}(\.\d*)?", text):
        raise ValueError(f"{variable}={text}: it needs a number, such as {default:g}")
    return float(text)


def _limit() -> float:
    return _number(LIMIT, 20) * 1e9


def _persistently(url: str, do: Callable[[Any, str], T], done: str = "read") -> T:
    """What ``do(file system, path)`` returns, tried again while the network is at fault; `done`: to
    the file, for messages."""
    begun, delay, attempts, warned = time.monotonic(), _FIRST, 0, False
    while True:
        attempts += 1
        try:
            import fsspec

            return do(*fsspec.core.url_to_fs(url))
        except Exception as error:  # those of each protocol are of many types
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"{url} does not exist: check the address") from error
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if _is_final(error):
                raise RemoteError(
                    f"{url} can't be {done} ({reason}): {_remedy(error, done)}"
                ) from error
            waited = time.monotonic() - begun
            if waited + delay > _number(WAIT, 300):
                raise RemoteError(
                    f"{url} can't be {done} ({reason}), tried {attempts} times in {waited:.0f} s: "
                    "check the network and the server, and go on (training: with --resume); "
                    f"{WAIT} says for how many seconds it is tried"
                ) from error
            # An attempt is short or, where the protocol's library tries again itself, takes long.
            if waited >= _LASTING and not warned:
                warned = True
                logger.warning("%s can't be %s (%s): waiting for it", url, done, reason)
        time.sleep(delay * random.uniform(0.5, 1))  # processes shouldn't come back all at once
        delay = min(2 * delay, _LONGEST)


def _is_final(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in (408, 429)
    return isinstance(error, _FINAL) or "Credential" in type(error).__name__


def _remedy(error: Exception, done: str) -> str:
    if isinstance(error, ImportError):
        return "pip install 'dynamic-dino[remote]' (gs:// needs 'dynamic-dino[gcs]')"
    return (
        f"check the address, and that it may be {done} from this machine (s3://: AWS_ACCESS_KEY_ID "
        "and AWS_SECRET_ACCESS_KEY or a profile, AWS_ENDPOINT_URL for another server than Amazon's)"
    )


def _is_folder(fs: Any, path: str) -> bool:
    """Raises FileNotFoundError, and what a fault of the network is: fsspec's own `isfile` and
    `isdir` take that for an answer."""
    return fs.info(path)["type"] == "directory"


def _state(fs: Any, path: str) -> str:
    """Tells whether a file or folder has changed."""
    fs.invalidate_cache()
    if _is_folder(fs, path):
        return repr([(file, fs.ukey(file)) for file in sorted(fs.find(path))])
    return str(fs.ukey(path))


def _copy(url: str, into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    target = str(into / _file_name(url))
    _persistently(url, lambda fs, path: fs.get(path, target, recursive=_is_folder(fs, path)))


def _file_name(url: str) -> str:
    return re.sub(r"[?#].*", "", url).rstrip("/").rpartition("/")[2][-100:]


def _entry(key: str) -> Path:
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    return cache_root() / "remote" / digest[:2] / digest[2:]


def _put(entry: Path, write: Callable[[Path], object]) -> None:
    """A file or folder appears whole or not at all."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    partial = entry.with_name(f"{entry.name}.{os.getpid()}-{secrets.token_hex(3)}.partial")
    try:
        write(partial)
        partial.replace(entry)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _locked(entry: Path) -> Any:
    """Of the processes of a machine, one fetches a large file."""
    from filelock import FileLock

    entry.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(entry.parent / ".lock")


def _count(size: int) -> None:
    """Measuring the cache takes a while, so that it is done after each fiftieth part of it."""
    global _written
    _written += size
    if _written > _limit() / 50:
        _written = 0.0
        _trim()


def _trim() -> None:
    """Removes what was read longest ago, down to nine tenths of the limit, but not the newest."""
    entries = []
    for path in (cache_root() / "remote").glob("*/[!.]*"):
        with suppress(OSError):  # another process may remove it
            stat = path.stat()
            size = stat.st_size
            if path.is_dir():
                size = sum(file.stat().st_size for file in path.rglob("*"))
            entries.append((stat.st_mtime, size, path))
    total = sum(size for _, size, _ in entries)
    if total <= _limit():
        return
    for _, size, path in sorted(entries)[:-1]:
        if total <= 0.9 * _limit():
            break
        with suppress(OSError):
            _remove(path)
        total -= size
