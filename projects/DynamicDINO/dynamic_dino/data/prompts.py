"""Which names a detector is asked for: the objects of an image and names that it doesn't show."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np


class PromptSampler:
    """Draws detection prompts: the classes of an image and random negatives, in random order.

    names            phrase of each class
    max_phrases      length of a prompt, as far as the classes suffice
    min_phrases      if given, the length is uniform in [min_phrases, max_phrases], never shorter
                     than the positives
    near_synonyms    for each class the classes that are never its negatives
    never_negative   classes that are no negatives at all (novel names of a training set: to learn
                     that they are always absent would be to learn the answer of the test)

    Ids are contiguous ints throughout: a comparison of str with int ids, which never match, has
    made positives their own negatives elsewhere (mmdetection PR #11404).
    """

    def __init__(
        self,
        names: Sequence[str],
        max_phrases: int,
        *,
        min_phrases: int | None = None,
        near_synonyms: Sequence[Iterable[int]] | None = None,
        never_negative: Iterable[int] = (),
    ) -> None:
        min_phrases = max_phrases if min_phrases is None else min_phrases
        if not 1 <= min_phrases <= max_phrases:
            raise ValueError(
                f"min_phrases {min_phrases}, max_phrases {max_phrases}: a prompt needs at least "
                "one phrase, and min_phrases <= max_phrases"
            )
        self.names = list(names)
        self.max_phrases = max_phrases
        self.min_phrases = min_phrases
        self.related = _related_classes(self.names, near_synonyms)
        self.negative = np.ones(len(self.names), dtype=bool)
        self.negative[[int(i) for i in never_negative]] = False

    def __call__(
        self, positives: Iterable[int], present: Iterable[int], rng: np.random.Generator
    ) -> list[int]:
        """Classes of a training prompt, in prompt order; see `sample` for the arguments."""
        positives = set(positives)
        length = int(rng.integers(self.min_phrases, self.max_phrases + 1))
        length = max(length, min(len(positives), self.max_phrases))
        return self.sample(positives, present, length, rng)

    def sample(
        self,
        positives: Iterable[int],
        present: Iterable[int],
        length: int,
        rng: np.random.Generator,
    ) -> list[int]:
        """`length` classes in random order, fewer if there aren't enough negatives.

        positives: classes with a box. If they are more than `length`, a random part is kept; the
        caller must then drop the boxes of the others. present: all that may be visible, crowds and
        cropped objects too; they and their near-synonyms are never negatives.
        """
        positives = sorted({self._check(i) for i in positives})
        if len(positives) > length:
            return rng.permutation(positives)[:length].tolist()
        allowed = self.negative.copy()
        for i in {*positives, *(self._check(i) for i in present)}:
            allowed[[i, *self.related[i]]] = False
        candidates = np.flatnonzero(allowed)
        count = min(length - len(positives), len(candidates))
        negatives = rng.choice(candidates, size=count, replace=False).tolist()
        return rng.permutation(np.array([*positives, *negatives], dtype=np.int64)).tolist()

    def _check(self, i: int) -> int:
        if not 0 <= int(i) < len(self.names):
            raise ValueError(
                f"category_id {i!r} of a record is outside the {len(self.names)} classes of its "
                "data set: do the mapper and the data set belong together?"
            )
        return int(i)


def evaluation_prompt(
    sampler: PromptSampler, present: Iterable[int], length: int, image_id: int | str
) -> list[int]:
    """Federated evaluation: every class of the image and negatives up to `length` names.

    The same image gets the same prompt whatever the order, rank or run. No class of the image is
    left out, so the prompt is longer than `length` when the image shows more.
    """
    present = set(present)
    rng = np.random.default_rng(zlib.crc32(str(image_id).encode()))
    return sampler.sample(present, present, max(length, len(present)), rng)


def caption_phrases(
    caption: str,
    phrase_spans: Sequence[Sequence[Sequence[int]]],
    present: Iterable[int],
    dropout: float,
    rng: np.random.Generator,
) -> dict[str, list[int]]:
    """The phrases of a caption in random order, for a detection prompt: text -> the phrases of the
    caption that say it, some of them left out.

    A phrase of several spans is said by one of them. Phrases of the same words become one, which
    has the boxes of all. With probability `dropout` a phrase is left out; its objects stay in the
    picture, so that no phrase that may mean them may stay without their boxes: phrases that share
    a word ("man", "man in red") are left out together. At least one stays.

    present: phrases that have a box.
    """
    texts: dict[str, list[int]] = {}
    spelling: dict[str, str] = {}
    for i in sorted(set(present)):
        start, end = phrase_spans[i][int(rng.integers(len(phrase_spans[i])))]
        text = " ".join(caption[start:end].split())
        if re.search(r"\w", text):
            text = spelling.setdefault(text.casefold(), text)
            texts.setdefault(text, []).append(i)
    kin = _phrases_that_share_words(list(texts))
    kept = [group for group in kin if rng.random() >= dropout]
    if kin and not kept:
        kept = [kin[int(rng.integers(len(kin)))]]
    phrases = sorted(text for group in kept for text in group)
    return {phrases[i]: texts[phrases[i]] for i in rng.permutation(len(phrases))}


# words that tell nothing about what a phrase means
_LITTLE_WORDS = frozenset(
    "a an and another at by each for from her his in is it its of on one or other over some that "
    "the their this to two under with".split()
)


def _phrases_that_share_words(phrases: list[str]) -> list[list[str]]:
    """Groups of phrases that are connected by common words, singular or plural."""
    groups: list[tuple[set[str], list[str]]] = []
    for phrase in phrases:
        words = {
            word[:-1] if len(word) > 3 and word.endswith("s") else word
            for word in re.findall(r"\w+", phrase.casefold())
        } - _LITTLE_WORDS
        members = [phrase]
        apart = []
        for other_words, others in groups:
            if words & other_words:
                words, members = words | other_words, others + members
            else:
                apart.append((other_words, others))
        groups = [*apart, (words, members)]
    return [members for _, members in groups]


def _related_classes(
    names: Sequence[str], near_synonyms: Sequence[Iterable[int]] | None
) -> list[list[int]]:
    """Near-synonyms of each class; classes that share one name are near-synonyms too."""
    same = defaultdict(list)
    for i, name in enumerate(names):
        same[name.casefold()].append(i)
    related = [set(same[name.casefold()]) for name in names]
    for i, others in enumerate(near_synonyms or ()):
        for j in others:
            related[i].add(int(j))
            related[int(j)].add(i)
    return [sorted(ids - {i}) for i, ids in enumerate(related)]
