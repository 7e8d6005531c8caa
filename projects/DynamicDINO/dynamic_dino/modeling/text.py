"""Text encoder: phrases to token features, one phrase block at a time.

Grounding DINO concatenates all phrases of a prompt, and masks the attention of its text encoder so
that a phrase sees only itself (the sub-sentence text mask), with position ids that start anew in
each phrase. That is the same as encoding every phrase by itself, which is what we do: nothing is
computed for masked pairs, a phrase that occurs twice in a batch is encoded once, and the features
of an encoder that doesn't train are cached per phrase. ``tests/modeling/test_text.py`` proves the
equality.
"""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging as hf_logging

from ..sources import resolve_model
from .name_tokens import doubts, tokens_of
from .prompt import Prompt, PromptWarning
from .structures import PromptChunk, TextFeatures


@dataclass(frozen=True)
class Block:
    """A part of a prompt that is encoded by itself: its text, and where it stands in the prompt."""

    text: str
    start: int


class Tokens(NamedTuple):
    """What the tokenizer makes of a text: numbers, and int64 [T, 2], the characters of each."""

    ids: list[int]
    offsets: np.ndarray


class Cache(OrderedDict):
    """A dict that forgets what was asked for longest ago, and all if weights have changed. A copy,
    such as that of a model, starts empty.

    Args:
        size: how many entries it holds or, with `weigh`, how much of what that says of each value.
    """

    # OrderedDict.copy() gives no arguments
    def __init__(self, size: int = 0, weigh: Callable[[Any], int] | None = None) -> None:
        super().__init__()
        self.size, self.weigh = size, weigh
        self._held = 0
        self._weights: list[tuple[int, int]] = []

    def __reduce__(self) -> tuple:
        return type(self), (self.size, self.weigh)

    def __getitem__(self, key: Hashable) -> Any:
        self.move_to_end(key)
        return super().__getitem__(key)

    def get(self, key: Hashable, default: Any = None) -> Any:
        return self[key] if key in self else default

    def __setitem__(self, key: Hashable, value: object) -> None:
        self._held += self._weight(value) - (self._weight(self[key]) if key in self else 0)
        super().__setitem__(key, value)
        while self._held > self.size:
            oldest = next(iter(self))
            self._held -= self._weight(super().__getitem__(oldest))
            del self[oldest]

    def _weight(self, value: object) -> int:
        return self.weigh(value) if self.weigh else 1

    def clear(self) -> None:
        super().clear()
        self._held = 0

    def drop_if_changed(self, parameters: Iterable[Tensor]) -> None:
        """Empties the cache if a parameter isn't the one of the last call: loading, moving and
        optimizer steps change its address or the version that torch counts."""
        weights = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]
        if weights != self._weights:
            self.clear()
            self._weights = weights


class TextEncoder(nn.Module):
    """A BERT-like encoder from transformers, and a projection to the detector's width.

    Args:
        model: hub id ("bert-base-uncased"), local directory, or "package:MODULE/DIRECTORY".
        dim: width of the detector.
        weights: load the encoder's pretrained weights; False builds it at random from its config.
        frozen: no gradients, and checkpoints may leave it to its pretrained weights.
        pooled: one token per phrase, the mean over its word pieces (sentence encoders), instead of
            one token per word piece (Grounding DINO).
        norm: layer norm after the projection, for an enhancer without text layers, whose norms
            otherwise give the class head vectors of a known length.
        max_tokens: at test time, longer prompts are split into chunks of so many tokens; captions
            to train on must not be longer.
        cache_size: tokens whose features are kept, of the phrases that were asked for last; in
            training too, unless gradients change the encoder. 100,000 are 0.3 GB of BERT-base's.
        cached_prompts: batches of prompts whose finished `TextFeatures` are kept in inference.
        config: overrides of the encoder's configuration, e.g. ``{"num_hidden_layers": 2}``.

    Attributes:
        pretrained: whether it brings its weights, so that checkpoints needn't.
        pad_to: in inference, batches are padded to a multiple of this many tokens and phrases, so
            that what is captured for one prompt serves others (`optimize_for_inference`).

    Raises:
        FileNotFoundError: the model is not at hand and can't be fetched.
        ValueError: transformers has no such model itself: what a model brings as code isn't run.
    """

    def __init__(
        self,
        model: str,
        dim: int = 256,
        weights: bool = True,
        frozen: bool = False,
        pooled: bool = False,
        max_tokens: int = 256,
        norm: bool = False,
        dropout: float = 0.0,
        grad_checkpointing: bool = False,
        cache_size: int = 100_000,
        cached_prompts: int = 64,
        tokenizer: str | None = None,
        config: dict | None = None,
    ) -> None:
        super().__init__()
        path = resolve_model(model)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                resolve_model(tokenizer or model), trust_remote_code=False
            )
            if weights:
                with quiet_transformers():
                    self.body = AutoModel.from_pretrained(
                        path, add_pooling_layer=False, trust_remote_code=False
                    )
            else:
                body_config = AutoConfig.from_pretrained(
                    path, trust_remote_code=False, **(config or {})
                )
                self.body = AutoModel.from_config(
                    body_config, add_pooling_layer=False, trust_remote_code=False
                )
        except (OSError, HFValidationError) as error:
            raise FileNotFoundError(
                f"text encoder {model!r} is neither in the Hugging Face cache nor a local "
                "directory, and the hub can't be reached; download it where there is internet and "
                f"set model.text_encoder.model=/path/to/it ({error})"
            ) from error
        except (ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"text encoder {model!r} isn't one that transformers has itself, and code that a "
                f"model brings is never run; name another ({reason[:200]})"
            ) from error
        self.dim, self.frozen, self.pooled, self.max_tokens = dim, frozen, pooled, max_tokens
        self.pretrained = weights
        self.positions: int | None = getattr(self.body.config, "max_position_embeddings", None)
        self.proj = nn.Linear(self.body.config.hidden_size, dim)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.reset_projection()
        if grad_checkpointing:
            self.body.gradient_checkpointing_enable()
        if frozen:
            self.body.requires_grad_(False)
        self.pad_to = 1
        self._chunks = Cache(cached_prompts)  # (prompt, max_phrases) -> its chunks
        self._readings = Cache(cache_size)  # text -> its word pieces
        self._tokens = Cache(cache_size, weigh=_count)  # text -> Tokens
        # (text, how it was encoded) -> output of the body [T, C]
        self._phrases = Cache(cache_size, weigh=len)
        self._prompts = Cache(cached_prompts)  # prompts -> TextFeatures

    def reset_projection(self) -> None:
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def train(self, mode: bool = True) -> TextEncoder:
        super().train(mode)
        trains = self._trains()
        if not trains:  # dropout would be cached
            self.body.eval()
        if mode:  # the weights are about to change
            self.forget(phrases=trains)
        return self

    def _trains(self) -> bool:
        """Whether gradients change the body, as its parameters have it: recipes freeze by name."""
        return not self.frozen and any(p.requires_grad for p in self.body.parameters())

    def forget(self, phrases: bool = True) -> None:
        """Empties the caches of features; without `phrases`, the body's outputs stay."""
        self._prompts.clear()
        if phrases:
            self._phrases.clear()

    # Prompts to blocks -------------------------------------------------------------------------
    def blocks(self, prompt: Prompt) -> list[Block]:
        """The sub-sentences of a prompt, each with its terminator ("." or "?")."""
        if self.pooled:
            return [Block(t, s[0][0]) for t, s in zip(prompt.texts, prompt.spans, strict=True)]
        sentences = re.finditer(r"[^.?]*[.?]|[^.?]+$", prompt.text)
        return [
            Block(text.strip(), m.start() + len(text) - len(text.lstrip()))
            for m in sentences
            if (text := m.group()).strip()
        ]

    def count_tokens(self, prompt: Prompt) -> int:
        """Length of the prompt in the text features, [CLS] and [SEP] included."""
        if self.pooled:
            return len(prompt.spans)
        return 2 + sum(len(self._tokenize(b.text).ids) for b in self.blocks(prompt))

    def refuse_long_caption(self, caption: str, file_name: str) -> None:
        """Raises ValueError for a caption that `max_tokens` doesn't hold: it isn't cut,
        since a part of a sentence means something else."""
        if len(caption) + 2 <= self.max_tokens:  # a token is at least a character
            return
        count = self.count_tokens(Prompt(caption, (((0, len(caption)),),)))
        if count > self.max_tokens:
            raise ValueError(
                f"the caption of {file_name!r} has {count} tokens, but at most {self.max_tokens} "
                f"fit: {caption[:80]!r} ...; shorten or split it or leave it out (`python -m "
                "dynamic_dino.data check` lists all of a data set), or raise "
                "model.text_encoder.max_tokens"
            )

    def split(self, prompt: Prompt, max_phrases: int | None = None) -> list[list[int]]:
        """Splits the phrases of a prompt so that each part fits `max_tokens` and `max_phrases`.

        Returns the phrase indices of each part; one part for a prompt that fits.
        Raises ValueError for a phrase of more than `max_tokens`.
        """
        max_phrases = max_phrases or len(prompt.spans)
        if len(prompt.spans) <= max_phrases and self.count_tokens(prompt) <= self.max_tokens:
            return [list(range(len(prompt.spans)))]
        parts: list[list[int]] = [[]]
        room = budget = self.max_tokens - (0 if self.pooled else 2)
        for i, text in enumerate(prompt.texts):
            size = 1 if self.pooled else len(self._tokenize(text + ".").ids)
            if size > budget:
                short = text if len(text) < 200 else f"{text[:200]} ..."
                raise ValueError(f"phrase {short!r} has {size} tokens, at most {budget} fit")
            if parts[-1] and (size > room or len(parts[-1]) == max_phrases):
                parts.append([])
                room = budget
            parts[-1].append(i)
            room -= size
        return parts

    def chunks(self, prompt: Prompt, max_phrases: int | None = None) -> list[PromptChunk]:
        """The prompts that a long prompt is split into by `split`; a short one is its own.

        A prompt that wasn't seen before is looked at: warns of names that have the same tokens, or
        none that is known, see `name_tokens`. Raises ValueError for a name without any token.
        """
        key = (prompt, max_phrases)
        chunks = self._chunks.get(key)
        if chunks is None:
            if prompt.names is not None:  # a caption may say a word twice, of two objects
                self._look_at_names(prompt)
            parts = self.split(prompt, max_phrases)
            whole = len(parts) == 1
            self._chunks[key] = chunks = [
                PromptChunk(prompt if whole else prompt.select(part), part[0]) for part in parts
            ]
        return chunks

    def _look_at_names(self, prompt: Prompt) -> None:
        texts, names = prompt.texts, prompt.phrases
        new = [text for text in dict.fromkeys(texts) if text not in self._readings]
        found = dict(zip(new, tokens_of(self.tokenizer, new), strict=True))
        readings = [found[t] if t in found else self._readings[t] for t in texts]
        self._readings.update(found)
        for i, tokens in enumerate(readings):
            if not tokens:
                raise ValueError(
                    f"phrase {i} of the prompt is {names[i]!r}, of which the text encoder reads "
                    "nothing: name the object in other words"
                )
        for doubt in doubts(names, readings, self.tokenizer.unk_token):
            warnings.warn(doubt, PromptWarning, stacklevel=2)

    def _tokenize(self, text: str) -> Tokens:
        tokens = self._tokens.get(text)
        if tokens is None:
            found = self.tokenizer(
                text, add_special_tokens=self.pooled, return_offsets_mapping=True, verbose=False
            )
            offsets = np.array(found["offset_mapping"], np.int64).reshape(-1, 2)
            self._tokens[text] = tokens = Tokens(found["input_ids"], offsets)
        return tokens

    # Encoding ----------------------------------------------------------------------------------
    def forward(self, prompts: list[Prompt]) -> TextFeatures:
        """Encodes a batch of prompts, padded to the longest: tokens [B, L, dim].

        In inference, a batch of prompts that was seen before comes from the cache.
        """
        if self.training or torch.is_grad_enabled():
            return self._features(prompts)
        device = self.proj.weight.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = (*prompts, autocast)
        self._prompts.drop_if_changed(self.parameters())
        found = self._prompts.get(key)
        if found is None:  # of a size of 0 nothing is kept
            self._prompts[key] = found = self._features(prompts).padded(self.pad_to)
        return found

    def _features(self, prompts: list[Prompt]) -> TextFeatures:
        blocks = [self.blocks(p) for p in prompts]
        specials = [] if self.pooled else [self.tokenizer.cls_token, self.tokenizer.sep_token]
        features = self._encode([b.text for row in blocks for b in row] + specials)

        rows, block_ids = [], []
        for row in blocks:
            texts = [b.text for b in row]
            if specials:
                texts = [specials[0], *texts, specials[1]]
            parts = [features[t] for t in texts]
            rows.append(torch.cat(parts))
            block_ids.append(np.repeat(np.arange(len(parts)), [p.shape[0] for p in parts]))

        tokens = self.norm(self.proj(self.dropout(pad_sequence(rows, batch_first=True))))
        device, (batch, length) = tokens.device, tokens.shape[:2]
        # Put together on the host, where a step has hundreds of phrases, and copied at once.
        ids = np.full((batch, length), -1)
        phrase_map = np.zeros((batch, max(len(p.spans) for p in prompts), length), np.float32)
        for i, (prompt, row) in enumerate(zip(prompts, blocks, strict=True)):
            ids[i, : len(block_ids[i])] = block_ids[i]
            part = self._phrase_map(prompt, row)
            phrase_map[i, : part.shape[0], : part.shape[1]] = part
        on_device = [torch.from_numpy(x).to(device, non_blocking=True) for x in (ids, phrase_map)]
        return TextFeatures(tokens, on_device[0] >= 0, *on_device)

    def _phrase_map(self, prompt: Prompt, blocks: list[Block]) -> np.ndarray:
        """Row p averages the tokens whose characters overlap phrase p: float32 [P, T], without the
        last token, [SEP]."""
        if self.pooled:
            return np.eye(len(prompt.spans), dtype=np.float32)
        offsets = [self._tokenize(block.text).offsets + block.start for block in blocks]
        starts, ends = np.concatenate([[[-1, -1]], *offsets]).T  # those of [CLS] overlap nothing
        counts = np.array([len(phrase) for phrase in prompt.spans])
        spans = np.array([span for phrase in prompt.spans for span in phrase]).reshape(-1, 2)
        overlaps = (starts < spans[:, 1:]) & (ends > spans[:, :1])  # [spans, T]
        result = np.zeros((len(counts), len(starts)), np.float32)
        if len(spans):  # the spans of a phrase follow each other
            first = (counts.cumsum() - counts)[counts > 0]
            result[counts > 0] = np.logical_or.reduceat(overlaps, first)
        return result / result.sum(-1, keepdims=True).clip(min=1)

    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        """Encodes unique texts, from the cache unless the encoder trains."""
        unique = list(dict.fromkeys(texts))
        learning = self.training or torch.is_grad_enabled()
        if learning and self._trains():
            return self._run(unique)
        device = self.proj.weight.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        # An encoder that only the recipe of a run froze is evaluated as its file would be, by a
        # detector that knows nothing of that recipe.
        exact = self.frozen or learning
        run, how = (self._run_frozen, "exact") if exact else (self._run, autocast)
        self._phrases.drop_if_changed(self.body.parameters())
        known = {t: self._phrases[t, how] for t in unique if (t, how) in self._phrases}
        if missing := [text for text in unique if text not in known]:
            known |= run(missing)
        for text in missing:  # a copy: not a part of the whole batch, which would be kept with it
            self._phrases[text, how] = known[text].detach().clone()
        return known

    def _run_frozen(self, texts: list[str]) -> dict[str, Tensor]:
        """As `_run`, but a text's features depend on nothing else, be it autocast or, in the last
        bit, its company in the batch: a resumed run, whose cache starts empty, gets the same."""
        with torch.autocast(self.proj.weight.device.type, enabled=False):
            if self.proj.weight.is_cuda:
                return self._run(texts)
            return {text: self._run([text])[text] for text in texts}

    def _run(self, texts: list[str]) -> dict[str, Tensor]:
        """Runs the encoder on texts, each a row: {text: [T, C]} (T = 1 when pooled)."""
        # On the host, which knows the lengths: the tokenizer's own `pad` takes ten times as long,
        # and to ask a GPU for them would wait for it.
        device = self.proj.weight.device
        ids = self._ids(texts)
        lengths = [len(i) for i in ids]
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        padded = np.full(mask.shape, self.tokenizer.pad_token_id or 0)
        padded[mask] = np.concatenate(ids)
        places = np.flatnonzero(mask)
        inputs = [
            torch.from_numpy(x).to(device, non_blocking=True)
            for x in (padded, mask.astype(np.int64), places)
        ]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._trains()):
            hidden = self.body(input_ids=inputs[0], attention_mask=inputs[1]).last_hidden_state
        rows = list(hidden.flatten(0, 1)[inputs[2]].split(lengths))
        if self.pooled:
            rows = [row.mean(0, keepdim=True) for row in rows]
        return dict(zip(texts, rows, strict=True))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        names = (self.tokenizer.cls_token, self.tokenizer.sep_token)
        numbers = self.tokenizer.convert_tokens_to_ids
        specials: dict[str, list[int]] = {n: [numbers(n)] for n in names if n}  # type: ignore[list-item]  # one
        found = [specials[t] if t in specials else self._tokenize(t).ids for t in texts]
        # `max_tokens` can't tell: a pooled phrase is one token of the prompt.
        if self.positions and max(map(len, found)) > self.positions:
            text, ids = max(zip(texts, found, strict=True), key=lambda pair: len(pair[1]))
            raise ValueError(
                f"phrase {text[:80]!r} ... has {len(ids):,} tokens, and the text encoder has "
                f"positions for {self.positions}: shorten it"
            )
        return found


def _count(tokens: Tokens) -> int:
    return len(tokens.ids)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides the loader's progress bar and its report that BERT's unused pooler wasn't loaded."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
