"""Checking the names of a data set: whether a text encoder can read them, and tell them apart."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from ..sources import resolve_model
from .problems import DataError

TOGETHER = 10_000  # names; what is tokenized at once takes memory


def check_names(file: Path, names: Sequence[str], tokenizer: str) -> Iterator[DataError]:
    """Names that aren't plain words, that have the same tokens, or none that is known.

    Args:
        tokenizer: the text encoder's, see `TextEncoder`; where there is none, names are compared
            letter by letter, and none is unknown.
    """
    for name in names:
        if re.search(r"[_()]|\s\s", name) or name != name.strip():
            what = f"name {name!r}: the text encoder reads it as it is; write it in plain words"
            yield DataError("unclean name", what, str(file))
    try:
        readings, strange = _read(names, tokenizer)
    except (OSError, ImportError):
        readings, strange = [name.casefold() for name in names], []
    first: dict[Hashable, str] = {}
    for name, reading in zip(names, readings, strict=True):
        if reading not in first:
            first[reading] = name
            continue
        what = f"names {first[reading]!r} and {name!r} are the same to the text encoder"
        if first[reading] == name:
            what = f"name {name!r} occurs twice"
        what = f"{what}: nothing can tell these classes apart; merge or rename them"
        yield DataError("duplicate name", what, str(file))
    for name in strange:
        what = f"name {name!r}: the text encoder knows none of its words; translate it"
        yield DataError("unknown name", what, str(file))


def _read(names: Sequence[str], tokenizer: str) -> tuple[list[Hashable], list[str]]:
    """What tells names apart, and those without a known token."""
    from ..modeling.name_tokens import known, tokens_of

    encode = _tokenizer(tokenizer)
    readings: list[Hashable] = []
    strange = []
    for start in range(0, len(names), TOGETHER):
        part = names[start : start + TOGETHER]
        tokens = tokens_of(encode, part)
        readings += tokens
        strange += [n for n, t in zip(part, tokens, strict=True) if not known(t, encode.unk_token)]
    return readings, strange


@lru_cache(maxsize=2)
def _tokenizer(tokenizer: str):
    from transformers import AutoTokenizer  # takes a second

    return AutoTokenizer.from_pretrained(resolve_model(tokenizer), trust_remote_code=False)
