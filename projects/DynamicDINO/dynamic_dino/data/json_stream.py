"""Reading JSON files of any size, an item at a time: the standard library's decoder reads the
items, here are the text that it gets, errors and progress.

Files of millions of annotations would need several times their size in memory if loaded at once.
Every item is what `json.loads` makes of it, with NaN and whole numbers of any size. UTF-8, -16 and
-32 are read, with or without a byte order mark.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from detectron2.utils import comm
from tqdm import tqdm

BUFFER = 1 << 18  # bytes
SPACE = re.compile(r"[ \t\n\r]*")
WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
DECODER = json.JSONDecoder()


class JsonError(ValueError):
    """What is wrong with a JSON file. `what` lacks the file."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path} is {what}")
        self.what = what


def stream_json(
    path: Path, lists: Sequence[str], *, progress: bool = True
) -> Iterator[tuple[str, int, Any]]:
    """(key, index, item) for each item of these lists of the object that a JSON file holds, in the
    file's order.

    Raises ValueError, naming the file, where it is not valid JSON or lacks one of the lists.
    """
    wanted = f"a file of this format has the lists {', '.join(map(repr, lists))}"
    seen: set[str] = set()
    for key, index, item in _walk(path, progress):
        if key is None and index >= 0:
            raise ValueError(f"{path} has no list {lists[0]!r}: {wanted}{_what_list(item)}")
        if key not in lists:
            continue
        if index >= 0:
            yield key, index, item
        elif item != "[":
            raise ValueError(f"{path} has no list {key!r}: {wanted}")
        elif key in seen:
            raise ValueError(f"{path} has the list {key!r} twice: join them")
        else:
            seen.add(key)
    for key in lists:
        if key not in seen:
            raise ValueError(f"{path} has no list {key!r}: {wanted}")


def stream_json_list(path: Path, *, progress: bool = True) -> Iterator[Any]:
    """The items of a JSON file that holds one list; raises as `stream_json` does."""
    is_list = False
    for key, index, item in _walk(path, progress):
        is_list = key is None
        if not is_list:
            break
        if index >= 0:
            yield item
    if not is_list:
        raise ValueError(f"{path} is not a valid JSON list: write one, [item, item, ...]")


def stream_jsonl(path: Path, *, progress: bool = True) -> Iterator[tuple[int, Any]]:
    """(line number, content) of each line that isn't blank; raises as `stream_json` does."""
    with _open(path, progress) as (file, bar):
        encoding = _encoding(file)
        lines = file if encoding.startswith("utf-8") else io.TextIOWrapper(file, encoding)
        for number, line in enumerate(lines, start=1):
            bar.update(len(line))
            where = f"{path}, line {number}"
            if isinstance(line, bytes):
                try:
                    line = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{where}: {_not_text(error, encoding)}") from None
            if not line.strip():
                continue
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{where}: not valid JSON ({error}): correct the line; is the file truncated?"
                ) from None
            yield number, content


def load_json(path: Path) -> Any:
    """The content of a small file; raises `JsonError`."""
    with _open(path, progress=False) as (file, bar):
        text = _Text(path, file, bar)
        content = text.value()
        text.end()
    return content


def keys_of(path: Path) -> Iterator[str]:
    """The keys of the object that a file holds, each before its value is read; raises `JsonError`
    where the file gets wrong."""
    return (key for key, index, _ in _walk(path, False) if key is not None and index < 0)


def require_json(path: Path) -> None:
    """Reads the whole file; raises `JsonError` if it isn't valid."""
    for _ in _walk(path, False):
        pass


def _walk(path: Path, progress: bool) -> Iterator[tuple[str | None, int, Any]]:
    """Of the object in a file, for each key: (key, -1, the character with which its value begins),
    and if that is a list, (key, index, item) for its items. Of a list the same with None as key."""
    with _open(path, progress) as (file, bar):
        text = _Text(path, file, bar)
        opening = text.peek()
        if opening == "{":
            for _ in text.items("}"):
                key = text.key()
                yield key, -1, text.peek() or text.value()
                if text.peek() == "[":
                    for index, _ in enumerate(text.items("]")):
                        yield key, index, text.value()
                else:
                    text.value()
        elif opening == "[":
            yield None, -1, opening
            for index, _ in enumerate(text.items("]")):
                yield None, index, text.value()
        else:
            text.value()
        text.end()


class _Text:
    """The text of a file, of which `buffer` is in memory; what comes next begins at `at`."""

    def __init__(self, path: Path, file: IO[bytes], bar: tqdm) -> None:
        self.path, self.file, self.bar = path, file, bar
        self.buffer, self.at = "", 0
        self.line, self.column = 1, 1  # of the buffer's first character
        self.encoding = _encoding(file)
        self.decoder = codecs.getincrementaldecoder(self.encoding)()
        self.not_text: JsonError | None = None

    def peek(self) -> str:
        """The next character that is no space; "" at the end of the file."""
        while True:
            self.at = SPACE.match(self.buffer, self.at).end()
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self._read_on():
                return ""

    def items(self, closing: str) -> Iterator[None]:
        """Stops before each item of the list, or key of the object, that begins here."""
        self.at += 1
        if self.peek() != closing:
            while True:
                yield
                mark = self.peek()
                if mark == closing:
                    break
                if mark != ",":
                    raise self._invalid(f"Expecting ',' or '{closing}'", self.at)
                self.at += 1
        self.at += 1

    def key(self) -> str:
        key = self.value()
        if not isinstance(key, str) or self.peek() != ":":
            raise self._invalid("Expecting a name in double quotes and ':'", self.at)
        self.at += 1
        return key

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                # what the buffer cuts is found wrong at its end, or in a string that doesn't end
                cut = error.msg.startswith("Unterminated") or len(self.buffer) - error.pos < 10
                if not (cut and self._read_on()):
                    raise self._invalid(error.msg, error.pos) from None
                continue
            except ValueError as error:  # a number of too many digits
                raise self._invalid(str(error), self.at) from None
            except RecursionError:
                raise self._invalid("nested too deeply", self.at) from None
            # a number may go on: "1", "1.", "1e-"
            if len(self.buffer) - end > 2 or not self._read_on():
                self.at = end
                return value

    def end(self) -> None:
        """Nothing may come any more."""
        if self.peek():
            raise self._invalid("Extra data", self.at)
        if self.not_text:
            raise self.not_text

    def _read_on(self) -> bool:
        """Forgets what was read and reads a part more, at least as long as the rest, so that a long
        item isn't begun again and again. False: the file has ended."""
        rest = len(self.buffer) - self.at
        block = self.file.read(max(BUFFER, rest))
        self.bar.update(len(block))
        try:
            text = self.decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            self.not_text = JsonError(self.path, _not_text(error, self.encoding))
            if block:
                raise self.not_text from None
            return False  # the last letter is cut; whether more is, the decoder says
        if not block:
            return False
        self.line, self.column = self._place(self.at)
        self.buffer, self.at = self.buffer[self.at :] + text, 0
        return bool(text) or self._read_on()

    def _place(self, at: int) -> tuple[int, int]:
        """Line and column, from 1, of a character of the buffer."""
        lines = self.buffer.count("\n", 0, at)
        if not lines:
            return self.line, self.column + at
        return self.line + lines, at - self.buffer.rindex("\n", 0, at)

    def _invalid(self, what: str, at: int) -> JsonError:
        rest = self.buffer[at:].strip()
        unfinished = "Unterminated" in what or (what.startswith("Invalid \\") and '"' not in rest)
        begun = any(word.startswith(rest) for word in WORDS) or re.fullmatch(r"[.eE][+-]?", rest)
        truncated = unfinished or bool(begun)
        line, column = self._place(at)
        remedy = (
            "the file may be truncated; write or download it again"
            if truncated
            else "correct it there, or write the file again"
        )
        near = f" near {self.buffer[max(at - 30, 0) : at + 10]!r}" if self.buffer else ""
        return JsonError(
            self.path, f"not valid JSON ({what}: line {line}, column {column}{near}): {remedy}"
        )


def _encoding(file: IO[bytes]) -> str:
    """By the first bytes, which stay unread."""
    head = file.read(4)
    file.seek(0)
    return json.detect_encoding(head)


def _not_text(error: UnicodeDecodeError, encoding: str) -> str:
    before = error.object[: error.start][-30:].decode(encoding, errors="ignore")
    name = encoding.removesuffix("-sig").upper()
    return (
        f"not text in {name} (byte {error.object[error.start]:#04x} after {before!r}): it is in "
        "another encoding, such as Windows' cp1252 or GBK; save it as UTF-8"
    )


def _what_list(item: Any) -> str:
    """What a file with a list may be that was taken for another."""
    keys = item.keys() if isinstance(item, dict) else ()
    if "score" in keys:
        return ". This one is a list of detections: name the annotation file"
    if {"data", "annotations"} <= {*keys} or "annotation_id" in keys:
        return (
            ". This one is Label Studio's own JSON, a list of tasks: its path alone is a data set, "
            "as `python -m dynamic_dino.data check PATH` shows; where COCO JSON is needed, export "
            "the project as COCO"
        )
    return ""


@contextmanager
def _open(path: Path, progress: bool) -> Iterator[tuple[IO[bytes], tqdm]]:
    with (
        path.open("rb") as file,
        tqdm(
            total=path.stat().st_size,
            desc=path.name,
            unit="B",
            unit_scale=True,
            delay=1,  # small files need no bar
            disable=None if progress and comm.is_main_process() else True,
        ) as bar,
    ):
        yield file, bar
