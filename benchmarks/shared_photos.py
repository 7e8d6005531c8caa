#!/usr/bin/env python
"""Referring expressions of one photo, as in RefCOCO: what it saves to look at the photo once.

    python benchmarks/shared_photos.py                      # nano and Edge, minutes
    python benchmarks/shared_photos.py --save               # ... kept in benchmarks/results/cpu/
    python benchmarks/shared_photos.py --sentences 7 --models nano

A batch is so many sentences, each asked for by itself, of one photo of noise. "once": they share
the photo's tensor, as `TestMapper` makes them, so that the backbone runs once; "each": every one
has its own. The detector has random weights; the sentences are of random words, new ones in each
round, so that none is remembered. Both must find the same.

Timing is interleaved, by the CPU time of the process, in one thread; given are medians, quartiles
and the ratio of the medians. It is that of a CPU: on a GPU the parts weigh otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from dynamic_dino.console import command
from dynamic_dino.modeling.prompt import Prompt
from lib.detectors import COCO_NAMES, RECIPE, build, load_model_config, samples
from lib.interleaved import interleave, quartiles
from lib.options import add_output, new_parser, place_output
from lib.provenance import provenance, settings, write_json

# recipe; side of the square photo
MODELS = {"nano": ("configs/moe_tuning/nano_x16_drawn.py", 320), "Edge": (RECIPE, 640)}
SENTENCE = 4  # words; those of RefCOCO have 3.5 on average


class Expressions:
    """Batches of new sentences about one photo, shared or not."""

    def __init__(self, size: int, count: int) -> None:
        self.photo, self.count = samples((size, size))[0], count
        self.rng = np.random.default_rng(0)
        self.sentences: list[Prompt] = []

    def draw(self) -> None:
        words = self.rng.choice(COCO_NAMES, (self.count, SENTENCE))
        self.sentences = [Prompt.from_phrases([" ".join(each)]) for each in words]

    def batch(self, shared: bool) -> list[dict]:
        image = self.photo["image"]
        return [
            self.photo | {"image": image if shared else image.clone(), "prompt": prompt}
            for prompt in self.sentences
        ]


def candidates(model: str, sentences: int) -> dict[str, Callable[[], float]]:
    """Functions that detect new sentences and return the CPU time."""
    recipe, size = MODELS[model]
    torch.manual_seed(0)
    detector = build(load_model_config(recipe, ["model.canvas=null"]))
    asked = Expressions(size, sentences)
    asked.draw()
    scores = [detector.detect(asked.batch(shared))[-1]["instances"].scores for shared in (1, 0)]
    if not torch.allclose(*scores, atol=1e-4):
        raise SystemExit(f"{model}: a shared photo gives other scores")

    def detect(shared: bool) -> float:
        asked.draw()
        batch, start = asked.batch(shared), time.process_time()
        detector.detect(batch)
        return time.process_time() - start

    return {"each": lambda: detect(False), "once": lambda: detect(True)}


@command
def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--sentences", type=int, default=7, help="of a photo; RefCOCO's val has 7")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    add_output(parser)
    options = parser.parse_args(arguments)
    place_output(options, "shared_photos")
    torch.set_num_threads(1)
    report = provenance(("torch", "transformers", "numpy")) | {"rows": []}
    report["settings"] = settings(options)
    for model in options.models:
        with torch.inference_mode():
            times = interleave(candidates(model, options.sentences), options.repeats)
        row = {"model": model} | {name: quartiles(values) for name, values in times.items()}
        row["speedup"] = row["each"]["median_ms"] / row["once"]["median_ms"]
        report["rows"].append(row)
        print(
            f"{model}: {options.sentences} sentences of a photo {row['each']['median_ms']:.0f} ms, "
            f"sharing it {row['once']['median_ms']:.0f} ms CPU, {row['speedup']:.2f} times as fast",
            flush=True,
        )
        if options.json:
            write_json(options.json, report)


if __name__ == "__main__":
    main()
