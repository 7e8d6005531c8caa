"""Records of large annotation files, kept as arrays that a later start opens in milliseconds.

The first process of a machine that needs a file reads it while the others wait, which takes minutes
for a million records; all of them map the same arrays into memory. Entries are known by the content
of the file, the options of its reader and the code that read it. They lie in
``$DYNAMIC_DINO_CACHE``, by default ``~/.cache/dynamic_dino``, and may be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog

from ..files import sha256_of_file, write_text
from ..remote import CACHE as VARIABLE
from ..remote import cache_root
from .catalog import replace_metadata
from .records import Records, Texts

logger = logging.getLogger(__name__)

LARGE = 32 * 2**20  # bytes; what is smaller is read in seconds


def kept_records(
    files: Sequence[Path], options: Mapping[str, Any], read: Callable[[], Records]
) -> Records:
    """What ``read()`` returns, with the metadata that it sets and the warnings that it logs, from
    the cache if the files have been read before and are large enough to be kept.

    Args:
        options: all that the result depends on besides the content of the files.
    """
    file, sizes = files[0], [path.stat().st_size for path in files if path.is_file()]
    if len(sizes) < len(files) or sum(sizes) < LARGE:
        return read()
    folder = _folder(file, options)
    if folder is None:
        return read()
    with _locked(folder, file):
        entry = folder / _key(_content(folder, files))
        records = _open(entry)
        if records is not None:
            return records
        with _warnings() as said:
            records = read()
        if entry.name != _key(_content(folder, files)):  # it has changed meanwhile
            return records
        try:
            _write(entry, records, said)
        except (OSError, TypeError, ValueError) as error:  # a full disk, say
            logger.warning("The records of %s can't be kept in %s: %s", file, folder, error)
            return records
        for other in folder.iterdir():  # of former contents; who has mapped them keeps them
            if other.is_dir() and other != entry:
                shutil.rmtree(other, ignore_errors=True)
        return _open(entry, say=False) or records


def _folder(file: Path, options: Mapping[str, Any]) -> Path | None:
    """Where the records of a file lie that was read with these options; None if nowhere."""
    asked = json.dumps([str(file.resolve()), dict(options)], sort_keys=True, default=repr)
    folder = cache_root() / "records" / hashlib.sha256(asked.encode()).hexdigest()[:24]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        logger.info("%s is read anew at each start: %s; set %s", file, error, VARIABLE)
        return None
    return folder


@contextmanager
def _locked(folder: Path, file: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        try:
            lock.acquire(timeout=1)
        except Timeout:
            logger.info("Another process reads %s: waiting for it", file)
            lock.acquire()
    except (NotImplementedError, OSError) as error:  # several may read it, to the same entry
        logger.info("%s can't be locked: %s", folder, error)
    try:
        yield
    finally:
        lock.release()


def _content(folder: Path, files: Sequence[Path]) -> str:
    """SHA-256 of the files; of such as look as before, what it was."""
    found = [path.stat() for path in files]
    looks = [
        [str(p), s.st_size, s.st_mtime_ns, s.st_ino] for p, s in zip(files, found, strict=True)
    ]
    note = folder / "content.json"
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
        if before["looks"] == looks:
            return before["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    sha256 = " ".join(map(sha256_of_file, files))
    with suppress(OSError):  # a full disk: it is hashed again
        write_text(note, json.dumps({"looks": looks, "sha256": sha256}))
    return sha256


def _key(content: str) -> str:
    return hashlib.sha256(f"{content} {_code()}".encode()).hexdigest()[:24]


@cache
def _code() -> str:
    """Of the readers, whose next version may make other records of the same file."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What is logged meanwhile, of warnings and worse."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    readers = logging.getLogger(__package__)
    readers.addHandler(handler)
    try:
        yield said
    finally:
        readers.removeHandler(handler)


def _write(entry: Path, records: Records, said: list[str]) -> None:
    metadata = MetadataCatalog.get(records.dataset_name).as_dict()
    plain = _plain(metadata)
    if _back(plain) != metadata:
        raise TypeError("its metadata are no plain data")
    content = {
        "dataset_name": records.dataset_name,
        "image_root": records.image_root,
        "ids": None if isinstance(records.ids, np.ndarray) else records.ids,
        "metadata": plain,
        "warnings": said,
    }
    partial = Path(tempfile.mkdtemp(dir=entry.parent, prefix="partial-"))
    try:
        for name, array in records.buffers().items():
            np.save(partial / f"{name}.npy", array)
        write_text(partial / "records.json", json.dumps(content))
        shutil.rmtree(entry, ignore_errors=True)
        partial.rename(entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open(entry: Path, say: bool = True) -> Records | None:
    """The records of an entry, and their metadata; None where it isn't there or is damaged.
    Warnings of its file are logged again, unless they just were."""
    try:
        content = json.loads((entry / "records.json").read_text(encoding="utf-8"))
        arrays = {
            path.name.removesuffix(".npy"): np.load(path, mmap_mode="r")
            for path in entry.glob("*.npy")
        }
        texts = {
            name: Texts(arrays[f"{name}.data"], arrays[f"{name}.ends"])
            for name in ("names", "extra")
            if f"{name}.data" in arrays
        }
        metadata = _back(content["metadata"])
        records = Records(
            content["dataset_name"],
            content["image_root"],
            texts["names"],
            arrays["ids"] if content["ids"] is None else content["ids"],
            **{name: arrays[name] for name in Records.ARRAYS},
            extra=texts.get("extra"),
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    replace_metadata(**metadata)
    for warning in content["warnings"] if say else ():
        logger.warning("%s", warning)
    return records


def _plain(value: Any) -> Any:
    """As JSON can hold it; keys that are no text, and tuples, survive."""
    if isinstance(value, Mapping):
        return {"pairs": [[_plain(k), _plain(v)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_plain(item) for item in value]}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _back(value: Any) -> Any:
    if isinstance(value, dict):
        if "tuple" in value:
            return tuple(_back(item) for item in value["tuple"])
        return {_back(k): _back(v) for k, v in value["pairs"]}
    return [_back(item) for item in value] if isinstance(value, list) else value
