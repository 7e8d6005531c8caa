#!/usr/bin/env python
"""AP before and after runs that start from a directory of transformers, as public weights do.

    python benchmarks/finetune_public.py Stamps=output/gdino_nano_stamps \
        Raccoon=output/gdino_nano_custom "Raccoon, x4-Top2=output/gdino_nano_x4"

Each argument is a name and the folder of a finished run of train_net.py with train.eval_first=True.
Writes ``benchmarks/results/cpu/finetune_public.json``, and prints its table.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import results
from report import provenance, write_json

PACKAGES = ("torch", "transformers", "timm", "numpy", "faster-coco-eval")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu"))
    args = parser.parse_args()
    runs = {}
    for run in args.runs:
        name, _, folder = run.rpartition("=")
        if not name:
            parser.error(f"{run!r} is not of the form NAME=FOLDER")
        runs[name] = read_run(Path(folder))
    report = provenance(PACKAGES) | {"runs": runs}
    write_json(args.out / "finetune_public.json", report)
    print(results.finetune_public(report))


def read_run(folder: Path) -> dict:
    """Commands, length and scores of a run; raises SystemExit where it is not finished."""
    try:
        after = json.loads((folder / "results.json").read_text())
        log = (folder / "log.txt").read_text()
        rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    except FileNotFoundError as error:
        raise SystemExit(f"{folder} is not a finished run of train_net.py: {error}") from None
    first = next((row for row in rows if "val/AP" in row), {})
    if first.get("iteration", rows[-1]["iteration"]) >= rows[-1]["iteration"]:
        raise SystemExit(f"{folder} has no scores from before it: set train.eval_first=True")
    return {
        "commands": re.findall(r"Command: (.*)", log),
        "resumed_at": [int(i) for i in re.findall(r"Resuming from .*, iteration (\d+)", log)],
        "iterations": rows[-1]["iteration"] + 1,
        "before": {key: value for key, value in first.items() if key.startswith("val/")},
        "after": after,
    }


if __name__ == "__main__":
    main()
