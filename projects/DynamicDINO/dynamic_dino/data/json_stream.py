"""Reading JSON files of any size, an item at a time, and writing them whole or not at all.

Python's own decoder does the work, on a window of the file: as fast as ``json.load``, which would
need several times the file's size in memory, and one pass for all lists of a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from detectron2.utils import comm
from tqdm import tqdm

CHUNK = 1 << 20  # characters
_SPACE = re.compile(r"[ \t\n\r]*")
_AFTER_VALUE = {*" \t\n\r,:]}"}
_decode = json.JSONDecoder().raw_decode


def stream_json(
    path: Path, lists: Sequence[str], *, progress: bool = True
) -> Iterator[tuple[str, int, Any]]:
    """(key, index, item) for each item of these lists of the object that a JSON file holds, in the
    file's order.

    Raises ValueError, naming the file, where it is not valid JSON or lacks one of the lists.
    """
    seen = set()
    with _open(path, progress) as file:
        try:
            for key, index, item in _Window(file).members():
                if index is not None:
                    seen.add(key)
                    if key in lists and index >= 0:
                        yield key, index, item
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} is not valid JSON ({error}): the file may be truncated; write or "
                "download it again"
            ) from error
    for name in lists:
        if name not in seen:
            raise ValueError(
                f"{path} has no list {name!r}: a file of this format has the lists "
                f"{', '.join(map(repr, lists))}"
            )


def stream_json_list(path: Path, *, progress: bool = True) -> Iterator[Any]:
    """The items of a JSON file that holds one list; raises as `stream_json` does."""
    with _open(path, progress) as file:
        try:
            yield from _Window(file).items()
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} is not a valid JSON list ({error}): the file may be truncated; write or "
                "download it again"
            ) from error


def stream_jsonl(path: Path, *, progress: bool = True) -> Iterator[tuple[int, Any]]:
    """(line number, content) of each line that isn't blank; raises as `stream_json` does."""
    with _open(path, progress) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                content = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not valid JSON ({error}): is the file truncated?"
                ) from error
            yield number, content


@contextmanager
def written_whole(path: Path) -> Iterator[IO[str]]:
    """A text file to write to; `path` changes when all is written, and only then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _open(path: Path, progress: bool) -> Iterator[IO[str]]:
    with (
        path.open(encoding="utf-8") as file,
        tqdm(
            total=path.stat().st_size,
            desc=path.name,
            unit="B",
            unit_scale=True,
            delay=1,  # small files need no bar
            disable=None if progress and comm.is_main_process() else True,
        ) as bar,
    ):
        yield _Counted(file, bar)


class _Counted:
    """A text file that tells a progress bar how far it is."""

    def __init__(self, file: IO[str], bar: tqdm) -> None:
        self.file = file
        self.bar = bar

    def read(self, size: int) -> str:
        text = self.file.read(size)
        self.bar.update(len(text))  # characters for bytes: near enough
        return text

    def __iter__(self) -> Iterator[str]:
        for line in self.file:
            yield line
            self.bar.update(len(line))


class _Window:
    """The part of the file around what is read next."""

    def __init__(self, file: _Counted) -> None:
        self.file = file
        self.text = ""
        self.at = 0

    def members(self) -> Iterator[tuple[str, int | None, Any]]:
        """(key, index, item) for items of lists, after (key, -1, None); (key, None, value) else."""
        self.expect("{")
        while self.next() != "}":
            key = self.value()
            self.expect(":")
            if self.next() == "[":
                yield key, -1, None
                for index, item in enumerate(self.items()):
                    yield key, index, item
            else:
                yield key, None, self.value()
            if self.next() != "}":
                self.expect(",")

    def items(self) -> Iterator[Any]:
        """Those of the list that begins here."""
        self.expect("[")
        while self.next() != "]":
            yield self.value()
            if self.next() != "]":
                self.expect(",")
        self.at += 1

    def next(self) -> str:
        """The next character that is no space."""
        while True:
            character = self.text[self.at : self.at + 1]
            if character > " ":  # not at the end of the window, which is ""
                return character
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.fill():
                raise json.JSONDecodeError("the end is missing", self.text, self.at)

    def expect(self, character: str) -> None:
        if self.next() != character:
            raise json.JSONDecodeError(f"expected {character!r}", self.text, self.at)
        self.at += 1

    def value(self) -> Any:
        """The value that `next` has come to."""
        while True:
            try:
                value, end = _decode(self.text, self.at)
                # a number that isn't delimited yet ("12", "12.") may go on behind the window
                if self.text[end : end + 1] in _AFTER_VALUE or not self.fill():
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.text) - 16 or error.msg.startswith("Unterminated")
                if not cut or not self.fill():
                    raise

    def fill(self) -> bool:
        more = self.file.read(max(CHUNK, len(self.text) - self.at))
        if more:
            self.text = self.text[self.at :] + more
            self.at = 0
        return bool(more)
