"""`ClassVocabulary`: what a closed-set detector has in the place of a text encoder."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .name_tokens import said_of_alike
from .prompt import Prompt, PromptWarning
from .structures import PromptChunk, TextFeatures


class ClassVocabulary(nn.Module):
    """The classes that a closed-set detector knows, asked for by their names.

    Prompts are as for an open vocabulary, only that each phrase must be the name of a class. To the
    rest of the detector each class is a token, and a phrase is one of them; the tokens have no
    features, because `LinearHead` and `ClassDenoising` learn what there is to know of a class. A
    class that the prompt doesn't name is masked: no query is selected for it, none is called it,
    and it doesn't count in the loss.

    Args:
        names: of the classes, in the order of the class head. Recipes may name a data set instead,
            see `dynamic_dino.data.class_names`.

    Attributes:
        names: the list of names.
        frozen, pretrained: there are no weights that a checkpoint should hold.
        pad_to: in inference, prompts are padded to a multiple of this many phrases, see
            `TextEncoder`.

    Raises:
        ValueError: no names, or two that are the same as phrases.
    """

    frozen = pretrained = True
    rows: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        if not self.names:
            raise ValueError(
                "a closed-set detector needs the names of its classes, but the list is empty"
            )
        self._ids: dict[str, int] = {}
        for i, text in enumerate(Prompt.from_phrases(self.names).texts):
            first = self._ids.setdefault(text.casefold(), i)
            if first != i:
                raise ValueError(
                    f"classes {first} and {i} are named {self.names[first]!r} and "
                    f"{self.names[i]!r}, which a prompt can't tell apart: give each a name of its "
                    "own"
                )
        self.pad_to = 1
        one_hot = torch.eye(len(self.names) + 1, dtype=torch.bool)[:, :-1]  # the last row pads
        self.register_buffer("rows", one_hot, persistent=False)

    def forward(self, prompts: list[Prompt]) -> TextFeatures:
        """tokens [B, C, 0] and phrase_map [B, P, C] of C classes; see `TextFeatures`."""
        rows = [torch.tensor(self.ids(prompt)) for prompt in prompts]
        ids = pad_sequence(rows, batch_first=True, padding_value=len(self.names))
        if not self.training:
            more = -ids.shape[1] % self.pad_to
            ids = nn.functional.pad(ids, (0, more), value=len(self.names))
        phrase_map = self.rows[ids.to(self.rows.device, non_blocking=True)]
        mask = phrase_map.any(1)
        blocks = torch.arange(len(self.names), device=mask.device).expand_as(mask)
        tokens = mask.new_zeros(*mask.shape, 0, dtype=torch.float32)
        return TextFeatures(tokens, mask, blocks, phrase_map.float())

    def ids(self, prompt: Prompt) -> list[int]:
        """The class of each phrase. Raises ValueError for a phrase that is no class."""
        texts = [text.casefold() for text in prompt.texts]
        for text, phrase in zip(texts, prompt.phrases, strict=True):
            if text not in self._ids:
                near = difflib.get_close_matches(text, self._ids, n=1)
                name = self.names[self._ids[near[0]] if near else 0]
                hint = f"did you mean {name!r}?" if near else f"such as {name!r}"
                raise ValueError(
                    f"{phrase!r} is none of the {len(self.names)} classes of this closed-set "
                    f"detector, {hint}"
                )
        return [self._ids[text] for text in texts]

    def chunks(self, prompt: Prompt, max_phrases: int | None = None) -> list[PromptChunk]:
        """A prompt of more than `max_phrases` is split, see `TextEncoder.chunks`; warns of a class
        that is asked for more than once."""
        for doubt in said_of_alike(prompt.phrases, self.ids(prompt)):
            warnings.warn(doubt, PromptWarning, stacklevel=2)
        count = len(prompt.spans)
        step = max_phrases or count
        if count <= step:
            return [PromptChunk(prompt, 0)]
        parts = (range(first, min(first + step, count)) for first in range(0, count, step))
        return [PromptChunk(prompt.select(part), part[0]) for part in parts]

    def forget(self, phrases: bool = True) -> None:
        """Nothing is kept of a prompt."""

    def refuse_long_caption(self, caption: str, file_name: str) -> None:
        """Raises ValueError: captions name what they like."""
        raise ValueError(
            f"{file_name!r} has a caption, {caption[:80]!r}, but a closed-set detector knows only "
            "the names of its classes: train it on a detection data set"
        )
