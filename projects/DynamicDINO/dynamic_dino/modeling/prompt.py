"""`Prompt`: the text that a detector is asked for, and where its phrases stand in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

Span = tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """A text and its phrases, each given by one or more half-open character spans.

    Detection prompts list names ("red panda. windmill."), grounding prompts are captions whose
    phrases are parts of a sentence. Sub-sentences, which end at a full stop or a question mark,
    don't see each other in the text encoder (Grounding DINO's sub-sentence text mask).
    """

    text: str
    spans: tuple[tuple[Span, ...], ...]

    def __post_init__(self) -> None:
        if not self.spans:
            raise ValueError("empty prompt: give at least one phrase, e.g. 'red panda. windmill.'")
        for phrase in self.spans:
            for start, end in phrase:
                if not 0 <= start < end <= len(self.text):
                    raise ValueError(
                        f"prompt span ({start}, {end}) lies outside its text of {len(self.text)} "
                        f"characters: {self.text!r}"
                    )

    @classmethod
    def from_phrases(cls, phrases: Sequence[str]) -> Prompt:
        """One sub-sentence per phrase. Raises ValueError for an empty or blank phrase."""
        text, spans = "", []
        for i, phrase in enumerate(phrases):
            clean = _clean(phrase)
            if not clean:
                raise ValueError(
                    f"phrase {i} of the prompt is {phrase!r}: every phrase needs at least one "
                    "letter or digit; remove it or name the object"
                )
            spans.append(((len(text), len(text) + len(clean)),))
            text += clean + ". "
        return cls(text.rstrip(), tuple(spans))

    @classmethod
    def from_caption(cls, caption: str, spans: Sequence[Sequence[Span]]) -> Prompt:
        """A caption with the character spans of each of its phrases."""
        return cls(caption, tuple(tuple((int(s), int(e)) for s, e in phrase) for phrase in spans))

    @classmethod
    def parse(cls, text: str) -> Prompt:
        """Splits "red panda. windmill." at full stops, as the command line takes it."""
        return cls.from_phrases([part for part in re.split(r"[.?\n]", text) if part.strip()])

    @property
    def phrases(self) -> list[str]:
        return [" ".join(self.text[s:e] for s, e in phrase) for phrase in self.spans]

    def select(self, indices: Sequence[int]) -> Prompt:
        """The detection prompt of some of the phrases; used to split long prompts."""
        phrases = self.phrases
        return Prompt.from_phrases([phrases[i] for i in indices])


def _clean(phrase: str) -> str:
    """Full stops separate phrases, so they can't stand inside one ("St. Bernard")."""
    words = re.sub(r"[.?\s]+", " ", phrase).strip()
    return words if re.search(r"\w", words) else ""
