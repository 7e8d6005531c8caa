"""`Prompt`: the text that a detector is asked for, and where its phrases stand in it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Span = tuple[int, int]

# What lists are separated by elsewhere; not in a number such as "1,5 L".
_OTHER_SEPARATORS = re.compile(r"(?<!\d)[,;|]|[,;|](?!\d)|[，、；。]")


class PromptWarning(UserWarning):
    """A prompt that works, but hardly as it was meant."""


@dataclass(frozen=True)
class Prompt:
    """A text and its phrases, each given by one or more half-open character spans.

    Detection prompts list names ("cow. horse."), grounding prompts are captions whose
    phrases are parts of a sentence. Sub-sentences, which end at a full stop or a question mark,
    don't see each other in the text encoder (Grounding DINO's sub-sentence text mask).

    Args:
        names: what each phrase is called where it was found; default: what the text encoder reads
            of it, its part of the text. The text of "St. Bernard" is "St Bernard", since full stops
            end a sub-sentence.
    """

    text: str
    spans: tuple[tuple[Span, ...], ...]
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.spans:
            raise ValueError("empty prompt: give at least one phrase, e.g. 'cow. horse.'")
        if self.names is not None and len(self.names) != len(self.spans):
            raise ValueError(f"{len(self.names)} names for {len(self.spans)} phrases of a prompt")
        for phrase in self.spans:
            for start, end in phrase:
                if not 0 <= start < end <= len(self.text):
                    raise ValueError(
                        f"prompt span ({start}, {end}) lies outside its text of {len(self.text)} "
                        f"characters: {self.text!r}"
                    )

    @classmethod
    def from_phrases(cls, phrases: Iterable[str]) -> Prompt:
        """One sub-sentence per phrase; `Prompt.phrases` are the very strings that are given.

        Raises ValueError for a phrase that is no text, or has no letter or digit.
        """
        if isinstance(phrases, str | bytes):
            raise ValueError(
                f"the phrases of a prompt are a list of texts, not {phrases!r}: put it into a "
                "list, or have a text split at its full stops by Prompt.parse"
            )
        text, spans, names = "", [], list(phrases)
        for i, phrase in enumerate(names):
            clean = _clean(phrase, i)
            spans.append(((len(text), len(text) + len(clean)),))
            text += clean + ". "
        return cls(text.rstrip(), tuple(spans), tuple(names))

    @classmethod
    def from_caption(cls, caption: str, spans: Sequence[Sequence[Span]]) -> Prompt:
        """A caption with the character spans of each of its phrases."""
        return cls(caption, tuple(tuple((int(s), int(e)) for s, e in phrase) for phrase in spans))

    @classmethod
    def parse(cls, text: str) -> Prompt:
        """Splits "cow. horse." at full stops, question marks and line breaks, as the
        command line takes it; a phrase is what stands between them, without the blanks around it.

        A name with a full stop in it can't be given so, but in a list: see `from_phrases`. Warns of
        a phrase with commas in it, which may be meant as several.
        """
        parts = [part.strip() for part in re.split(r"[.?\n]", text) if part.strip()]
        for part in parts:
            listed = [p.strip() for p in _OTHER_SEPARATORS.split(part) if p.strip()]
            if len(listed) > 1:
                warnings.warn(
                    f"{part!r} is one phrase, since full stops separate phrases; if you mean "
                    f"{len(listed)}, write {'. '.join(listed) + '.'!r}",
                    PromptWarning,
                    stacklevel=2,
                )
        return cls.from_phrases(parts)

    @property
    def texts(self) -> list[str]:
        """What the text encoder reads of each phrase."""
        return [" ".join(self.text[s:e] for s, e in phrase) for phrase in self.spans]

    @property
    def phrases(self) -> list[str]:
        """Each phrase as it was given: what detections are called."""
        return self.texts if self.names is None else list(self.names)

    def select(self, indices: Sequence[int]) -> Prompt:
        """The detection prompt of some of the phrases; used to split long prompts."""
        phrases = self.phrases
        return Prompt.from_phrases([phrases[i] for i in indices])


def _clean(phrase: object, i: int) -> str:
    """What stands in the prompt's text for phrase `i`. Full stops separate phrases there, so they
    can't stand inside one ("St. Bernard")."""
    if not isinstance(phrase, str):
        raise ValueError(
            f"phrase {i} of the prompt is {shown(phrase)}: every phrase must be a text; name the "
            "object that is looked for"
        )
    words = re.sub(r"[.?\s]+", " ", phrase).strip()
    if not re.search(r"\w", words):
        raise ValueError(
            f"phrase {i} of the prompt is {phrase!r}: every phrase needs at least one letter or "
            "digit; remove it or name the object"
        )
    if re.search("[\ud800-\udfff]", words):
        raise ValueError(
            f"phrase {i} of the prompt, {phrase!r}, isn't whole Unicode text (half of a surrogate "
            "pair): read it with the encoding that it was written in"
        )
    return words


def shown(value: object) -> str:
    """A value of a wrong kind for an error message: "7 (int)"."""
    text = repr(value)
    return f"{text[:60]}{' ...' if len(text) > 60 else ''} ({type(value).__name__})"
