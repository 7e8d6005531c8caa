"""Which cut-out shows what: the hand-checked list behind the data set (``vocabulary.json``).

The file is an allow-list. Every stamp was looked at; clip-art, line drawings, symbols, lettering
and pictures that can't be named in a few words are simply not in it. Of each description a short
noun phrase was kept ("Sweet yellow corn." -> "corn"). A picture can have a general name besides its
own ("apple" and "green apple"), a phrase can have several pictures. Drawn sprites of gcompris
(``sprite:NAME``) widen the vocabulary.

near_synonyms lists pairs of phrases that must never be each other's negatives: cosine of their
MiniLM sentence embeddings above 0.7, or a hand-made entry (general and special names, part and
whole). Phrases that share a picture are added when the file is read. ``novel`` phrases (15%, drawn
at random within each group of subjects; each with pictures of its own) never occur in the training
split.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

VOCABULARY_FILE = Path(__file__).with_name("vocabulary.json")
SPRITE = "sprite:"


@dataclass(frozen=True)
class Vocabulary:
    """Phrases and what belongs to them.

    pictures        phrase -> names of its cut-outs, seen and novel phrases alike
    novel           phrases held out of the training split
    near_synonyms   phrase -> phrases that are never its negatives (symmetric, without itself)
    no_flip         cut-outs with lettering, not to be mirrored
    backgrounds     split ("train" or "held_out") -> names of background photos, "<rcc stem>/<stem>"
    """

    pictures: dict[str, list[str]]
    novel: frozenset[str]
    near_synonyms: dict[str, frozenset[str]]
    no_flip: frozenset[str]
    backgrounds: dict[str, list[str]]

    @property
    def phrases(self) -> list[str]:
        return list(self.pictures)

    @property
    def cutouts(self) -> list[str]:
        return sorted({name for names in self.pictures.values() for name in names})

    def synonyms_of(self, phrase: str) -> frozenset[str]:
        return self.near_synonyms.get(phrase, frozenset())


def make_vocabulary(
    pictures: dict[str, list[str]],
    novel: list[str],
    near_synonyms: list[list[str]],
    no_flip: list[str] = (),
    backgrounds: dict[str, list[str]] | None = None,
) -> Vocabulary:
    """Check the parts against each other and complete the near-synonyms.

    Raises ValueError when a novel phrase has no picture or shares one with a seen phrase.
    """
    phrases_of: dict[str, set[str]] = {}
    for phrase, names in pictures.items():
        for name in names:
            phrases_of.setdefault(name, set()).add(phrase)
    held_out = frozenset(novel)
    for phrase in sorted(held_out):
        if not pictures.get(phrase):
            raise ValueError(f"vocabulary: novel phrase {phrase!r} has no pictures")
        leaks = {other for name in pictures[phrase] for other in phrases_of[name]} - held_out
        if leaks:
            raise ValueError(f"vocabulary: novel phrase {phrase!r} shares a picture with {leaks}")
    neighbours: dict[str, set[str]] = {}
    sharing = [tuple(names) for names in phrases_of.values()]
    for group in [*map(tuple, near_synonyms), *sharing]:
        for phrase in group:
            neighbours.setdefault(phrase, set()).update(set(group) - {phrase})
    return Vocabulary(
        pictures=pictures,
        novel=held_out,
        near_synonyms={phrase: frozenset(others) for phrase, others in neighbours.items()},
        no_flip=frozenset(no_flip),
        backgrounds=backgrounds or {"train": [], "held_out": []},
    )


def load_vocabulary(path: Path = VOCABULARY_FILE) -> Vocabulary:
    content = json.loads(path.read_text())
    return make_vocabulary(
        pictures=content["phrases"],
        novel=content["novel"],
        near_synonyms=content["near_synonyms"],
        no_flip=content["no_flip"],
        backgrounds=content["backgrounds"],
    )
