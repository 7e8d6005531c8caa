"""Reading JSON files of any size, an item at a time: ijson parses, here are errors and progress.

Files of millions of annotations would need several times their size in memory if loaded at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import ijson
from detectron2.utils import comm
from tqdm import tqdm

BUFFER = 1 << 18  # bytes


def stream_json(
    path: Path, lists: Sequence[str], *, progress: bool = True
) -> Iterator[tuple[str, int, Any]]:
    """(key, index, item) for each item of these lists of the object that a JSON file holds, list
    by list: the file is read once for each.

    Raises ValueError, naming the file, where it is not valid JSON or lacks one of the lists.
    """
    for name in lists:
        index = -1
        for index, item in enumerate(_items(path, f"{name}.item", name, progress)):
            yield name, index, item
        if index < 0 and list(_items(path, name, name, progress)) != [[]]:
            raise ValueError(
                f"{path} has no list {name!r}: a file of this format has the lists "
                f"{', '.join(map(repr, lists))}"
            )


def stream_json_list(path: Path, *, progress: bool = True) -> Iterator[Any]:
    """The items of a JSON file that holds one list; raises as `stream_json` does."""
    empty = True
    for item in _items(path, "item", "", progress):
        empty = False
        yield item
    if empty and list(_items(path, "", "", progress)) != [[]]:
        raise ValueError(f"{path} is not a valid JSON list: write one, [item, item, ...]")


def stream_jsonl(path: Path, *, progress: bool = True) -> Iterator[tuple[int, Any]]:
    """(line number, content) of each line that isn't blank; raises as `stream_json` does."""
    with _open(path, "", progress) as (file, bar):
        for number, line in enumerate(file, start=1):
            bar.update(len(line))
            if not line.strip():
                continue
            try:
                content = json.loads(line)
            except ValueError as error:  # of JSON or of UTF-8
                raise ValueError(
                    f"{path}, line {number}: not valid JSON ({error}): is the file truncated?"
                ) from error
            yield number, content


def _items(path: Path, prefix: str, name: str, progress: bool) -> Iterator[Any]:
    with _open(path, name, progress) as (file, bar):
        try:
            yield from ijson.items(_Counted(file, bar), prefix, use_float=True, buf_size=BUFFER)
        except (ijson.JSONError, UnicodeDecodeError) as error:
            # What is wrong, the text around it, and an arrow, each a line.
            reason = ": ".join(line.strip() for line in str(error).splitlines()[:2])
            raise ValueError(
                f"{path} is not valid JSON ({reason}): the file may be truncated; write or "
                "download it again"
            ) from error


@contextmanager
def _open(path: Path, name: str, progress: bool) -> Iterator[tuple[IO[bytes], tqdm]]:
    with (
        path.open("rb") as file,
        tqdm(
            total=path.stat().st_size,
            desc=f"{path.name} {name}".strip(),
            unit="B",
            unit_scale=True,
            delay=1,  # small files need no bar
            disable=None if progress and comm.is_main_process() else True,
        ) as bar,
    ):
        yield file, bar


class _Counted:
    """A file that tells a progress bar how far it is."""

    def __init__(self, file: IO[bytes], bar: tqdm) -> None:
        self.file, self.bar = file, bar

    def read(self, size: int) -> bytes:
        block = self.file.read(size)
        self.bar.update(len(block))
        return block
