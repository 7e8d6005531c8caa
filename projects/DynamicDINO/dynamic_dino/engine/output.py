"""Output folders at addresses (``train.output_dir=s3://bucket/run``), for machines that may vanish.

A run writes into a folder of this machine. What it has written there is copied to the address after
each checkpoint and evaluation, in a thread, and at the end; on a new machine it is copied back.

What an interruption leaves at the address is what a killed run leaves on a disk. Weights go first,
then all else, then metrics.json, then `last_checkpoint`, and only then is removed what the run has
removed. Those two are copied as they were when the copy was asked for, all else as it is by then:
the checkpoint that is named is there, and model_best.pth is at least as young as the scores in
metrics.json, without which a resumed run would neither have it nor evaluate again.

One run writes to an address. What is there counts; unless nobody has moved its `last_checkpoint`
since this machine wrote or fetched it: then this machine's folder counts, which is as far or
further. Which one that was is kept in the folder (`RECORD`), by what the storage tells of files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from detectron2.utils import comm

from ..config import ConfigError
from ..files import write_text
from ..remote import (
    RemoteError,
    Version,
    address,
    cache_root,
    download,
    fetch,
    listing,
    remove,
    upload,
)

logger = logging.getLogger(__name__)

RECORD = ".copied.json"
NOTE = "running.json"
METRICS, POINTER = "metrics.json", "last_checkpoint"
SYNC = {"s3": "aws s3 sync", "gs": "gcloud storage rsync --recursive"}  # by hand


def local_folder(output_dir: str | Path) -> Path:
    """Where a run's files lie on this machine: its output folder or, for an address, a folder of
    the cache."""
    url = _address(output_dir)
    if url is None:
        return Path(output_dir)
    name = re.sub(r"[^\w.-]+", "-", url.partition("://")[2])[-60:]
    return cache_root() / "runs" / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def holds_a_run(output_dir: str | Path) -> bool:
    """Whether there is a run at an address; False for a path."""
    url = _address(output_dir)
    return url is not None and POINTER in listing(url)


def copy_soon(output_dir: str | Path) -> None:
    """Copies what is there by now, meanwhile. Like the other two for addresses only, where `copied`
    has them open, and on the main process."""
    if copy := _open.get(_address(output_dir)):
        copy.ask()


def copy_now(output_dir: str | Path) -> None:
    """Copies it before this returns; where that fails, the log says so."""
    if copy := _open.get(_address(output_dir)):
        copy.try_now()


def description(output_dir: str | Path) -> str:
    """What became of the folder of this machine at the start, for the log; "" for paths."""
    copy = _open.get(_address(output_dir))
    return copy.begun if copy else ""


@contextmanager
def copied(output_dir: str | Path, new: bool = False) -> Iterator[None]:
    """Meanwhile `local_folder` stands for the address: it has what is there at the beginning, and
    the address what it has at the end, on the main process. Other machines fetch the checkpoints.
    Nothing for a path. Collective.

    Args:
        new: the run is to begin, not to go on.

    Raises:
        ConfigError: the address can't be read or written, or holds a run and this is a new one.
        RemoteError: the last copy failed. After another error the log says so.
    """
    url = _address(output_dir)
    if url is None or url in _open:
        yield
        return
    copy, main = _Copy(url, local_folder(output_dir)), comm.is_main_process()
    token = _in_all(lambda: copy.begin(new) if main else "")[0]
    _in_all(lambda: "" if main else copy.join(token))
    if main:
        _open[url] = copy
    try:
        yield
    except BaseException:  # processes may have come apart: nothing collective
        if main and not copy.failed:
            copy.try_now(ended=True)
        raise
    else:
        problem = copy.end() if main else ""
        if problem := comm.all_gather(problem)[0]:
            raise RemoteError(problem)
    finally:
        _open.pop(url, None)


def _address(output_dir: str | Path) -> str | None:
    url = address(output_dir)
    return url and url.rstrip("/")


def _in_all(do: Callable[[], str]) -> list[str]:
    """What it returns in each process. Collective; an error of one is raised in all."""
    result = problem = ""
    try:
        result = do()
    except (OSError, ValueError) as error:
        problem = str(error)
    everywhere = comm.all_gather((result, problem))
    if problem := next((problem for _, problem in everywhere if problem), ""):
        raise ConfigError(problem)
    return [result for result, _ in everywhere]


class _Copy:
    """The folder of a run and its address.

    begun   what happened at the start, in words
    failed  the last copy did
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.begun, self.failed = "", False
        # name -> "there": the mark of its version at the address, "here": of the file that it is
        self._files: dict[str, dict[str, str]] = {}
        self._token = ""
        self._moving = False  # whether the pointer may be another than the record says, by us
        self._asked: dict[str, bytes] | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._read_record()

    # -- the beginning ----------------------------------------------------------------------------

    def begin(self, new: bool) -> str:
        """On the main process. Returns what this start is known by, which the record has too."""
        if self.url.startswith("http"):
            raise ConfigError(
                f"train.output_dir={self.url}: nothing can be written there; use s3://, gs:// or "
                "hf://, or a folder"
            )
        there, mine = listing(self.url), (self.folder / POINTER).is_file()
        if new and (POINTER in there or mine):
            raise ConfigError(
                f"{self.url if POINTER in there else self.folder} already holds a run; continue it "
                "with --resume, or choose another address with train.output_dir=ADDRESS"
            )
        if NOTE in there:
            note = " ".join(fetch(f"{self.url}/{NOTE}").read_text("utf-8", "replace").split())
            logger.warning(
                "%s was left by another run (%s): if that still runs, end it, one writes there",
                self.url,
                note,
            )
        note = self.folder / NOTE
        upload(note.read_bytes() if note.is_file() else b"{}\n", f"{self.url}/{NOTE}")
        if mine and (POINTER not in there or self._is_ours(there)):
            self._push(self._snapshot())  # it may be further, and other machines fetch it
            self.begun = f"goes on from the files of this machine, {self.folder}"
        else:
            count, size = self._fetch(there, _is_needed, _is_copied if POINTER in there else None)
            self.begun = f"{count} files ({size / 1e6:,.1f} MB) were fetched into {self.folder}"
        self._token = secrets.token_hex(8)
        self._keep_record()
        self.begun = f"{self.url}: {self.begun}, which is copied there as the run goes on"
        return self._token

    def join(self, token: str) -> str:
        """On all others. Of those that don't see the folder of the main one, one a machine fetches
        the checkpoints."""
        from filelock import FileLock

        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".fetching"):
            self._read_record()
            if self._token != token:
                self._fetch(listing(self.url), _is_resumed, _is_resumed)
                self._token = token
                self._keep_record()
        return ""

    def _is_ours(self, there: dict[str, Version]) -> bool:
        """Whether the pointer is as this folder left it."""
        return self._files.get(POINTER, {}).get("there") == there[POINTER].mark

    def _fetch(
        self,
        there: dict[str, Version],
        wanted: Callable[[str], bool],
        replaced: Callable[[str], bool] | None,
    ) -> tuple[int, int]:
        """Fetches what isn't as this folder left it; returns how many files, and bytes. Where files
        are `replaced`, what was changed here is fetched too, and what isn't there is removed."""
        names = sorted(filter(wanted, there), key=lambda name: (name == POINTER, name))
        if replaced:
            for name in set(filter(replaced, self._names())) - set(names):
                (self.folder / name).unlink(missing_ok=True)
                self._files.pop(name, None)
        names = [name for name in names if not self._has(name, there[name], bool(replaced))]
        size = sum(there[name].size for name in names)
        if names:  # printed: it takes a while, and no log is set up yet
            print(f"{self.url}: fetching {len(names)} files, {size / 1e6:,.1f} MB", flush=True)
        for name in names:
            download(f"{self.url}/{name}", self.folder / name)
            self._files[name] = {"there": there[name].mark, "here": self._mark(name)}
            self._keep_record()  # the pointer comes last: an interrupted start goes on here
        return len(names), size

    def _has(self, name: str, version: Version, unchanged: bool) -> bool:
        """Whether that version was copied before, and the file here is unchanged since, if it has
        to be."""
        known = self._files.get(name, {})
        same = not unchanged or known.get("here") == self._mark(name)
        return known.get("there") == version.mark and same

    # -- copying ----------------------------------------------------------------------------------

    def ask(self) -> None:
        """At most one copy waits for the one that is under way: that of the latest state."""
        now = self._snapshot()
        with self._lock:
            self._asked = now
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()

    def try_now(self, ended: bool = False) -> None:
        try:
            self._now(ended)
        except Exception as error:  # what ends the run is said otherwise
            logger.error("%s", self._complaint(error))

    def end(self) -> str:
        """What is wrong with the last copy, "" if nothing."""
        try:
            self._now(ended=True)
        except (OSError, ValueError) as error:
            return self._complaint(error)
        logger.info("All of %s is at %s", self.folder, self.url)
        return ""

    def _complaint(self, error: Exception) -> str:
        scheme = self.url.partition(":")[0]
        by_hand = f", or with `{SYNC[scheme]} {self.folder} {self.url}`" if scheme in SYNC else ""
        return (
            f"the run's files are in {self.folder}, and not all of them at {self.url}: {error}. "
            f"To copy them, start the same command on this machine with --resume{by_hand}"
        )

    def _now(self, ended: bool) -> None:
        with self._lock:
            self._asked, thread = None, self._thread
        if thread is not None:
            thread.join()
        self.failed = True
        self._push(self._snapshot())
        if ended:
            remove(f"{self.url}/{NOTE}")
        self.failed = False

    def _work(self) -> None:
        while True:
            with self._lock:
                now, self._asked = self._asked, None
                if now is None:
                    self._thread = None
                    return
            try:
                self._push(now)
            except Exception as error:  # training goes on whatever it is
                logger.warning(
                    "Not all of %s could be copied: %s. The run goes on, and the next checkpoint "
                    "is copied with what is missing",
                    self.folder,
                    error,
                )

    def _snapshot(self) -> dict[str, bytes]:
        """In the thread that writes them, see the head of this module."""
        paths = {name: self.folder / name for name in (METRICS, POINTER)}
        return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}

    def _push(self, now: dict[str, bytes]) -> None:
        there = listing(self.url)
        if POINTER in there and not self._moving and not self._is_ours(there):
            raise RemoteError(
                f"another run has written a checkpoint to {self.url}, so that nothing is copied "
                "there any more: one of the two must end"
            )
        pointed = now.get(POINTER, b"").decode("utf-8", "replace").strip()
        names = [name for name in self._names() if name not in (METRICS, POINTER)]
        names.sort(key=lambda name: (name != pointed, not name.endswith(".pth"), name))
        sent: dict[str, str] = {}  # and how it was here
        for name in names:
            here, path = self._mark(name), self.folder / name
            if here and not self._is_there(name, here, there):
                try:
                    upload(path, f"{self.url}/{name}")
                except FileNotFoundError:
                    if name == pointed or path.is_file():
                        raise
                    continue  # it was removed meanwhile
                sent[name] = here
        for name in (METRICS, POINTER):
            if name == POINTER:
                self._check_checkpoints(sent, pointed)
                self._moving = True
            if name in now and not self._is_there(name, here := _hash(now[name]), there):
                upload(now[name], f"{self.url}/{name}")
                sent[name] = here
        there = listing(self.url)
        for name, here in sent.items():
            if name in there:
                self._files[name] = {"there": there[name].mark, "here": here}
        self._keep_record()
        self._moving = False
        for name in set(self._files) - {*self._names(), METRICS, POINTER, pointed}:
            remove(f"{self.url}/{name}")
            del self._files[name]
        self._keep_record()

    def _check_checkpoints(self, sent: dict[str, str], pointed: str) -> None:
        """That they have come whole, before one is pointed to. Raises `RemoteError`, also where it
        was gone before it was copied."""
        there = listing(self.url)
        for name in filter(None, {pointed, *sent}):
            size = there[name].size if name in there else 0
            if name.endswith(".pth") and f"{size}" != sent.get(name, f"{size}").partition(" ")[0]:
                raise RemoteError(f"{self.url}/{name} has {size:,} bytes, which isn't all of it")
        if pointed and pointed not in there:
            raise RemoteError(f"{self.url}/{pointed} isn't there yet")

    def _is_there(self, name: str, here: str, there: dict[str, Version]) -> bool:
        known = self._files.get(name, {})
        return name in there and known == {"there": there[name].mark, "here": here}

    def _names(self) -> list[str]:
        found = []
        for folder, _, files in os.walk(self.folder):
            found += [(Path(folder) / file).relative_to(self.folder).as_posix() for file in files]
        return list(filter(_is_copied, found))

    def _mark(self, name: str) -> str:
        """Of the file here: another one when it has changed, "" if it is gone. Of those that are
        copied as they were, by their content."""
        path = self.folder / name
        with suppress(OSError):
            if name in (METRICS, POINTER):
                return _hash(path.read_bytes())
            stat = path.stat()
            return f"{stat.st_size} {stat.st_mtime_ns}"
        return ""

    def _read_record(self) -> None:
        with suppress(OSError, ValueError, KeyError):
            record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
            self._token, self._files = record["token"], record["files"]

    def _keep_record(self) -> None:
        record: dict[str, Any] = {"token": self._token, "files": self._files}
        write_text(self.folder / RECORD, json.dumps(record))


def _is_copied(name: str) -> bool:
    """Not locks and notes, nor what Slurm's job has there."""
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not (hidden or name == NOTE or name.endswith(".partial") or name.startswith("slurm/"))


def _is_needed(name: str) -> bool:
    """By a run or an evaluation that goes on: not the results of evaluations."""
    return _is_copied(name) and (not name.startswith("evaluation/") or "/unfinished/" in name)


def _is_resumed(name: str) -> bool:
    """By the other processes of a run that goes on."""
    return name == POINTER or bool(re.fullmatch(r"(?!model_best)[^/]+\.pth", name))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


_open: dict[str | None, _Copy] = {}  # of this process, by address
