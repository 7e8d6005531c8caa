#!/usr/bin/env python
"""AP of trained nano models on Stamps, side by side: base, MoE-tuned, and dense control.

    python benchmarks/nano_stamps.py dense=output/nano_stamps x16-Top2=output/nano_x16_stamps

Each argument is a name and the folder of a finished run of train_net.py. Writes
``benchmarks/results/cpu/nano_stamps.json`` with machine, versions, commit and commands, and prints
the table of docs/accuracy.md. Runs that the file has and that aren't named stay in it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dynamic_dino.console import command
from lib import tables as results
from lib.finished_run import read_folder
from lib.provenance import provenance, write_json

PACKAGES = ("torch", "transformers", "timm", "numpy", "faster-coco-eval")


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu"))
    args = parser.parse_args()
    report, out = provenance(PACKAGES), args.out / "nano_stamps.json"
    rows = json.loads(out.read_text())["runs"] if out.is_file() else {}
    for run in args.runs:
        name, _, folder = run.partition("=")
        if not folder:
            parser.error(f"{run!r} is not of the form NAME=FOLDER")
        rows[name] = {k: report[k] for k in ("machine", "commit")} | read_run(Path(folder))
    report["runs"] = rows
    write_json(out, report)
    print(results.nano_stamps(report))


def read_run(folder: Path) -> dict:
    """The command, length and final scores of a run; raises SystemExit where there are none."""
    run = read_folder(folder)
    command = run.commands[-1] if run.commands else ""
    return {"command": command, "iterations": run.iterations, "scores": run.scores}


if __name__ == "__main__":
    main()
