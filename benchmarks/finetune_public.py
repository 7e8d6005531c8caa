#!/usr/bin/env python
"""AP before and after runs that start from a directory of transformers, as public weights do.

    python benchmarks/finetune_public.py Raccoon=output/gdino_nano_custom \
        "Stamps, from random weights=output/gdino_nano_stamps:output/gdino_nano_random"

Each argument is a name, the folder of a finished run of train_net.py, and, unless it was run with
train.eval_first=True, the folder where what it started from was evaluated. Writes
``benchmarks/results/cpu/finetune_public.json``, and prints its table.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from lib import finished_run
from lib import tables as results
from lib.provenance import provenance, write_json

PACKAGES = ("torch", "transformers", "timm", "numpy", "faster-coco-eval")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER[:BEFORE]")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu"))
    args = parser.parse_args()
    runs = {}
    for run in args.runs:
        name, _, folder = run.rpartition("=")
        if not name:
            parser.error(f"{run!r} is not of the form NAME=FOLDER[:BEFORE]")
        runs[name] = read_run(*map(Path, folder.split(":")))
    report = provenance(PACKAGES) | {"runs": runs}
    write_json(args.out / "finetune_public.json", report)
    print(results.finetune_public(report))


def read_run(folder: Path, start: Path | None = None) -> dict:
    """Commands, length and scores of a run; raises SystemExit where it is not finished."""
    run = finished_run.read_folder(folder)
    if start is None:
        before = next((row for row in run.metrics[:-1] if "val/AP" in row), {})
    else:
        before = read_scores(start)
    if "val/AP" not in before:
        raise SystemExit(f"{folder} has no scores from before it: name a folder that has them")
    resumed = re.findall(r"Resuming from .*, iteration (\d+)", run.log)
    return {
        # Where its folder was doesn't matter
        "commands": [re.sub(r"(train.output_dir=)\S+", rf"\1{folder}", c) for c in run.commands],
        "resumed_at": [int(i) + 1 for i in resumed],
        "iterations": run.iterations,
        "before": {key: value for key, value in before.items() if key.startswith("val/")},
        "after": known(run.scores),
    }


def read_scores(folder: Path) -> dict[str, float]:
    try:
        return known(finished_run.read_scores(folder))
    except FileNotFoundError as error:
        raise SystemExit(f"{folder} holds no evaluation of train_net.py: {error}") from None


def known(scores: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in scores.items() if value == value}  # no NaN


if __name__ == "__main__":
    main()
