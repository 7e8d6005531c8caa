"""Names that a text encoder can't tell apart, or doesn't know, found by comparing their tokens.

What is dropped or unknown is a matter of the tokenizer: BERT's uncased one drops letter case,
accents and blanks, and makes one [UNK] of every word with a letter that its vocabulary lacks.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from ..console import some

Tokens = tuple[str, ...]


def tokens_of(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> list[Tokens]:
    """The tokens of each name, without those that begin and end a sequence."""
    if not len(names):
        return []
    rows = tokenizer(list(names), add_special_tokens=False, verbose=False)["input_ids"]
    return [tuple(tokenizer.convert_ids_to_tokens(row)) for row in rows]


def known(tokens: Tokens, unknown: str | None) -> bool:
    """Whether anything of a name is in the vocabulary, beside punctuation.

    Args:
        unknown: the tokenizer's token for what it doesn't know.
    """
    return any(token != unknown and re.search(r"\w", token) for token in tokens)


def alike(names: Sequence[str], readings: Sequence[Hashable]) -> Iterator[list[str]]:
    """The names that are read alike, in groups of two or more, equal ones included."""
    groups: dict[Hashable, list[str]] = {}
    for name, reading in zip(names, readings, strict=True):
        groups.setdefault(reading, []).append(name)
    return (group for group in groups.values() if len(group) > 1)


def doubts(names: Sequence[str], readings: Sequence[Tokens], unknown: str | None) -> list[str]:
    """What is to be said of a prompt's names, a sentence for each kind of doubt."""
    strange = [n for n, r in zip(names, readings, strict=True) if not known(r, unknown)]
    said = said_of_alike(names, readings)
    if strange:
        said.append(
            f"the text encoder knows no word or letter of {some([repr(n) for n in strange])}, so "
            "what is found says nothing of them: name them in a language of its vocabulary"
        )
    return said


def said_of_alike(names: Sequence[str], readings: Sequence[Hashable]) -> list[str]:
    """That names are given several times, and that different ones are read alike."""
    groups = list(alike(names, readings))
    equal = [repr(group[0]) for group in groups if len(set(group)) == 1]
    different = [
        " and ".join(repr(name) for name in dict.fromkeys(group))
        for group in groups
        if len(set(group)) > 1
    ]
    said = []
    if equal:
        said.append(
            f"the prompt has {some(equal)} more than once, so each of its boxes is found as often"
        )
    if different:
        said.append(
            f"the detector can't tell {some(different)} apart, which are the same to it, so each "
            "of their boxes is found under both names: ask for one of them, or use other words"
        )
    return said
