"""Bad files made of good ones, by rules and a seed, and whether an accepted one was read right.

A file is taken apart by a plain parser of its kind (`KINDS`), changed at one place and written
again, or damaged as bytes. Where the product then accepts it, what it read is compared with what it
read of the good file, see `misreading`.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import yaml

Path = tuple[str | int, ...]
ABSENT = "(absent)"
FLAGS = {"iscrowd", "novel", "difficult", "was_cancelled", "ground_truth"}
FLAG_WORDS = {"", "0", "0.0", "false", "no", "1", "1.0", "true", "yes", "none"}


def _nested(depth: int) -> list:
    return json.loads("[" * depth + "]" * depth)


# What people, scripts and attackers write instead of a value.
VALUES: list[Any] = [None, True, False, 0, -1, 7, 2**31, 2**63, 10**100, 1.5, -0.5, 1e308]
VALUES += [math.nan, math.inf, "abc", "12", "1", "false", "", "  ", "a\0b", "\ud800", "x" * 10**5]
VALUES += ["<script>alert(1)</script>", "../../../../etc/passwd", "/etc/hostname", "=1+1", "ひ"]
VALUES += [[], [1], ["a", "b"], _nested(40), {}, {"a": 1}]


# ---- kinds of files ----------------------------------------------------------------------------


class Kind(NamedTuple):
    """read   bytes -> dicts, lists, texts and numbers; raises ValueError where it is none of them
    write  back; values are texts unless `typed`
    """

    read: Callable[[bytes], Any]
    write: Callable[[Any], bytes]
    typed: bool = True


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _decode(content: bytes) -> str:
    """Of UTF-8, -16 and -32, with or without a byte order mark."""
    return content.decode(json.detect_encoding(content))


def _read_json(content: bytes) -> Any:
    return json.loads(content)


def _read_lines(content: bytes) -> Any:
    lines = _decode(content).splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def _write_lines(value: Any) -> bytes:
    lines = value if isinstance(value, list) else [value]
    return _encode("".join(f"{json.dumps(line)}\n" for line in lines))


def _read_xml(content: bytes) -> Any:
    def plain(node: ElementTree.Element) -> dict:
        texts = {"text": (node.text or "").strip()} if (node.text or "").strip() else {}
        return {"tag": node.tag, **node.attrib, **texts, "inside": [plain(n) for n in node]}

    try:
        return plain(ElementTree.fromstring(content))
    except ElementTree.ParseError as error:
        raise ValueError(str(error)) from error


def _write_xml(value: Any) -> bytes:
    def element(plain: dict) -> ElementTree.Element:
        known = {"tag", "text", "inside"}
        node = ElementTree.Element(
            plain.get("tag", "none"), {k: v for k, v in plain.items() if k not in known}
        )
        node.text = plain.get("text")
        node.extend([element(inside) for inside in plain.get("inside", [])])
        return node

    return _encode(ElementTree.tostring(element(value), encoding="unicode"))


def _read_csv(content: bytes) -> Any:
    try:
        rows = csv.reader(io.StringIO(_decode(content), newline=""), strict=True)
        return [row for row in rows if row]
    except csv.Error as error:
        raise ValueError(str(error)) from error


def _write_csv(value: Any) -> bytes:
    csv.writer(file := io.StringIO(newline="")).writerows(value)
    return _encode(file.getvalue())


def _read_words(content: bytes) -> Any:
    return [line.split() for line in _decode(content).splitlines() if line.strip()]


def _write_words(value: Any) -> bytes:
    return _encode("".join(" ".join(line) + "\n" for line in value))


def _read_yaml(content: bytes) -> Any:
    try:
        return yaml.safe_load(_decode(content))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


KINDS = {
    "json": Kind(_read_json, lambda value: _encode(json.dumps(value))),
    "jsonl": Kind(_read_lines, _write_lines),
    "xml": Kind(_read_xml, _write_xml, typed=False),
    "csv": Kind(_read_csv, _write_csv, typed=False),
    "txt": Kind(_read_words, _write_words, typed=False),
    "yaml": Kind(_read_yaml, lambda value: _encode(yaml.safe_dump(value))),
}


# ---- changes -----------------------------------------------------------------------------------


def places(value: Any, path: Path = ()) -> Iterator[Path]:
    """Every place in it, from the outside in; not the tags of XML."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            if key != "tag":
                yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(len(value)):
            yield from places(value[i], (*path, i))


def at(value: Any, path: Path) -> Any:
    """What stands there; `ABSENT` where nothing does."""
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return ABSENT
    return value


def changed(value: Any, path: Path, new: Any) -> Any:
    """A copy with another value there, or without it (`ABSENT`)."""
    if not path:
        return new
    result = copy.deepcopy(value)
    *outer, last = path
    if new is ABSENT:
        del at(result, tuple(outer))[last]
    else:
        at(result, tuple(outer))[last] = copy.deepcopy(new)
    return result


def mutants(content: bytes, kind: str, count: int, rng: random.Random) -> list[tuple[str, bytes]]:
    """So many bad files, each with what was done to the good one: two of three have another value
    at a place, the others are damaged as bytes."""
    good, codec = KINDS[kind].read(content), KINDS[kind]
    values = [v for v in VALUES if codec.typed or isinstance(v, str | int | float | None)]
    ways = [(path, new) for path in places(good) for new in (ABSENT, *values)]
    result: list[tuple[str, bytes]] = []
    for path, new in rng.sample(ways, len(ways)):
        if len(result) >= 2 * count // 3:
            break
        if not codec.typed and new is not ABSENT:
            if not isinstance(at(good, path), str):
                continue
            new = "" if new is None else str(new)
        try:
            bad = codec.write(changed(good, path, new))
        except (TypeError, ValueError, AttributeError, csv.Error):  # it can't be written so
            continue
        name = f"{'.'.join(map(str, path))} = {'absent' if new is ABSENT else repr(new)[:40]}"
        result.append((name, bad))
    special = [("empty", b""), ("zeros", bytes(100)), ("twice", content + content)]
    special += [("deep", b"[" * 10**5), ("UTF-16", content.decode().encode("utf-16"))]
    special += [("HTML", b"<!DOCTYPE html><html></html>"), ("BOM", b"\xef\xbb\xbf" + content)]
    result += special[: max(count - len(result), 0)]
    while len(result) < count:
        result.append(damaged(content, rng))
    return result


def damaged(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Cut off, or with one to five other bytes."""
    if rng.random() < 0.4:
        end = rng.randrange(len(content))
        return f"cut at {end}", content[:end]
    bad = bytearray(content)
    where = [rng.randrange(min(len(bad), rng.choice((40, 400, len(bad))))) for _ in range(5)]
    where = where[: rng.choice((1, 1, 1, 3, 5))]
    for i in where:
        bad[i] = rng.randrange(256)
    return f"other bytes at {', '.join(map(str, sorted(where)))}", bytes(bad)


# ---- what an accepted file means ---------------------------------------------------------------


class Reading:
    """A good file and what the product makes of it.

    Args:
        content, kind: the file, one of `KINDS`.
        read: bytes -> what the product makes of them, comparable; raises what the product raises.
        optional: fields that the documentation lets be left out.
    """

    def __init__(
        self,
        content: bytes,
        kind: str,
        read: Callable[[bytes], Any],
        optional: Sequence[str | int] = (),
    ) -> None:
        self.codec, self.read, self.optional = KINDS[kind], read, {*optional}
        self.good, self.wanted = self.codec.read(content), read(content)
        self._known: dict[Path, set[str]] = {}

    def misreading(self, content: bytes, found: Any) -> str:
        """What is wrong with a reading of a bad file, "" if nothing is.

        It is right where every place that matters (other good values there change what is read, or
        are refused)
        - means what it meant, where the same as of the good file was read: 1, 1.0 and "1" do; of a
          place of which nothing is read, such as the ids of boxes, any value that it may hold;
        - else holds what such a place may hold: a finite number, also as text, for a number; a text
          with a letter or digit for a text; a word for yes or no for a flag; as many numbers for a
          list of them; nothing where the documentation lets it be left out.
        What no parser of its kind reads must be refused.
        """
        try:
            bad = self.codec.read(content)
        except (ValueError, RecursionError) as error:
            return f"invalid ({' '.join(str(error).split())[:80]}) and accepted"
        differing = [d for d in differences(self.good, bad) if self.matters(d[0])]
        if found == self.wanted:
            lost = [d for d in differing if not self._same(*d) and not self._unread(*d)]
            return f"{_shown(lost[0])} was read as before" if lost else ""
        if not differing:
            return "nothing that matters differs, and something else was read"
        odd = [d for d in differing if not self._same(*d) and not self._plausible(*d)]
        return f"{_shown(odd[0])} was accepted" if odd else ""

    def matters(self, path: Path) -> bool:
        """Whether another good value there changes what is read, or is refused, or it may be left
        out, which may change it."""
        return _last(path) in self.optional or bool(self._effects(path))

    def _effects(self, path: Path) -> set[str]:
        """ "read", "refused": what other good values there bring about."""
        if path not in self._known:
            self._known[path] = {
                effect
                for other in _others(at(self.good, path))
                if (effect := self._effect(self.codec.write(changed(self.good, path, other))))
            }
        return self._known[path]

    def _effect(self, content: bytes) -> str:
        try:
            return "read" if self.read(content) != self.wanted else ""
        except (ValueError, OSError):
            return "refused"

    def _unread(self, path: Path, old: Any, new: Any) -> bool:
        """Whether nothing there is noticed, or only what can't be there, and `new` can."""
        effects = self._effects(path)
        return not effects or effects == {"refused"} and self._plausible(path, old, new)

    def _same(self, path: Path, old: Any, new: Any) -> bool:
        """Whether they mean the same. What a list lacks was not needed, if the same is read."""
        if _nothing(new):
            needless = new is ABSENT and isinstance(_last(path), int)
            return needless or _last(path) in self.optional or old in (None, 0, False, "", [], "0")
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            return all(self._same(path, a, b) for a, b in zip(old, new, strict=True))
        if _flag(path) is not None:
            return _truth(old) == _truth(new)
        a, b = _number(old), _number(new)
        return a == b if a is not None and b is not None else old == new

    def _plausible(self, path: Path, old: Any, new: Any) -> bool:
        """Whether a place that held `old` may hold `new`."""
        if new == [] and _last(path) in self.optional:
            return True
        an_id = str(_last(path)).endswith(("id", "near_synonyms"))  # which may be names, too
        if _nothing(new) and not (an_id and isinstance(new, str)):
            in_a_list = isinstance(_last(path), int) and not _numbers(at(self.good, path[:-1]))
            return _last(path) in self.optional or (new is ABSENT and in_a_list)
        if _flag(path) is not None:
            return str(new).strip().lower() in FLAG_WORDS
        if an_id:
            ids = new if isinstance(new, list) and isinstance(old, list) else [new]
            return all(_number(i) is not None or isinstance(i, str) for i in ids)
        if _number(old) is not None:
            return _number(new) is not None
        if isinstance(old, str):
            if self.codec is KINDS["yaml"] and type(new) is int:
                return True  # a name of digits, which YAML has without quotes
            return isinstance(new, str) and any(map(str.isalnum, new)) and "\0" not in new
        if _numbers(old):
            return _numbers(new) and len(new) == len(old)
        if self.codec is KINDS["yaml"] and isinstance(old, dict) and isinstance(new, list):
            return len(new) == len(old)  # names by their numbers, or in their order
        return old is None or type(new) is type(old)


def _nothing(value: Any) -> bool:
    return value is ABSENT or value is None or (isinstance(value, str) and not value.strip())


def _last(path: Path) -> str | int:
    return path[-1] if path else ""


def differences(old: Any, new: Any, path: Path = ()) -> Iterator[tuple[Path, Any, Any]]:
    """The innermost places of `old` where the two differ: (place, old, new)."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old:
            yield from differences(old[key], new.get(key, ABSENT), (*path, key))
    elif isinstance(old, list) and isinstance(new, list) and not _numbers(old):
        same = [a == b for a, b in zip(old, new, strict=False)]
        first = (same + [False]).index(False)
        behind = 0
        while behind < min(len(old), len(new)) - first and old[-1 - behind] == new[-1 - behind]:
            behind += 1
        rest = new[first : len(new) - behind]
        for i, value in enumerate(old[first : len(old) - behind]):
            other = rest[i] if i < len(rest) else ABSENT
            yield from differences(value, other, (*path, first + i))
        if len(new) > len(old):
            yield path, old, new
    elif type(old) is not type(new) or (old != new and repr(old) != repr(new)):
        yield path, old, new


def _others(value: Any) -> list:
    """Good values of its kind."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [1 - value, value + 1, value / 2]
    if isinstance(value, list):
        return [value[:-1]] if value else []
    if isinstance(value, dict):
        return [{}]
    number = _number(value)
    return [f"{value}x", "1"] if number is None else [f"{number + 1:g}", f"{number / 2:g}"]


def _number(value: Any) -> float | None:
    """A finite number, also one that is written as a text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.inf if isinstance(value, int) else None
    return number if math.isfinite(number) else None


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_number(v) is not None for v in value)


def _flag(path: Path) -> str | None:
    return next((step for step in reversed(path) if step in FLAGS), None)


def _truth(value: Any) -> bool | None:
    word = str(value).strip().lower()
    return word in {"1", "1.0", "true", "yes"} if word in FLAG_WORDS else None


def _shown(difference: tuple[Path, Any, Any]) -> str:
    path, old, new = difference
    text = re.sub(r"(.{60}).*", r"\1 ...", ascii(new))
    return f"{'.'.join(map(str, path)) or 'the file'}: {text} in place of {ascii(old)[:60]}"
