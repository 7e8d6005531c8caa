"""What a user asks for -> a `Prompt` for each image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..modeling.prompt import Prompt, shown

PromptLike = str | Iterable[str] | Prompt


def as_prompt(prompt: PromptLike) -> Prompt:
    """A text is split at its full stops; texts in a list, or what else gives them one by one, are
    phrases as they are. Raises ValueError for anything else, an empty prompt or phrase."""
    if isinstance(prompt, Prompt):
        return prompt
    return Prompt.parse(prompt) if isinstance(prompt, str) else Prompt.from_phrases(_items(prompt))


def prompts_of_images(prompts: PromptLike | Iterable[PromptLike], images: int) -> list[Prompt]:
    """A prompt for each of so many images: one for all, or a list of as many.

    Raises ValueError, naming the place of what is no prompt or phrase.
    """
    if isinstance(prompts, str | Prompt):
        return [as_prompt(prompts)] * images  # one object for all: its text is encoded once
    items = _items(prompts)
    if not any(_holds_phrases(item) for item in items):
        return [Prompt.from_phrases(items)] * images
    if len(items) == images:
        return [_of_image(item, i) for i, item in enumerate(items)]
    if any(isinstance(item, str) for item in items):  # a list among phrases
        Prompt.from_phrases(items)
    raise ValueError(
        f"{len(items)} prompts for {images} images: give one for all, or one for each image"
    )


def _of_image(prompt: PromptLike, image: int) -> Prompt:
    try:
        return as_prompt(prompt)
    except ValueError as error:
        raise ValueError(f"the prompt of image {image}: {error}") from None


def _holds_phrases(item: object) -> bool:
    return isinstance(item, Prompt | Iterable) and not isinstance(item, str | bytes | bytearray)


def _items(prompt: object) -> list:
    remedy = ""
    if isinstance(prompt, bytes | bytearray):
        remedy = "; decode it first, as in prompt.decode()"
    elif isinstance(prompt, Mapping):
        remedy = "; make a list of the names in it"
    elif isinstance(prompt, Iterable):
        try:
            return list(prompt)
        except TypeError:  # such as an array without dimensions
            pass
    raise ValueError(
        f"a prompt must be a text, a list of phrases (texts) or a Prompt, not {shown(prompt)}"
        + remedy
    )
