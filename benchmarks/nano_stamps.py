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

from detectron2.data import MetadataCatalog
from dynamic_dino import load_detector
from dynamic_dino.data.datasets import load_datasets
from dynamic_dino.demo import draw_photos
from lib import tables as results
from lib.finished_run import read_folder
from lib.provenance import provenance, write_json

PACKAGES = ("torch", "transformers", "timm", "numpy", "faster-coco-eval")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu"))
    parser.add_argument(
        "--picture", metavar="MODEL", help="also draw its detections on public-domain photos"
    )
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
    if args.picture:
        name = args.picture.replace("-", "_")
        draw_public_domain(args.picture, args.out / f"{name}_photos.jpg")


def read_run(folder: Path) -> dict:
    """The command, length and final scores of a run; raises SystemExit where there are none."""
    run = read_folder(folder)
    command = run.commands[-1] if run.commands else ""
    return {"command": command, "iterations": run.iterations, "scores": run.scores}


def draw_public_domain(model: str, path: Path, count: int = 12) -> None:
    """Detections on photos of val_real that anyone may show, evenly spread over the set."""
    registered = load_datasets("stamps_val_real")
    annotations = json.loads(Path(MetadataCatalog.get("stamps_val_real").json_file).read_text())
    free = {
        image["id"]
        for image in annotations["images"]
        if image["licence"].lower() in ("public domain", "cc0-1.0")
    }
    records = [r for r in registered if r["image_id"] in free]
    draw_photos(load_detector(model), records, count, path)
    print(path)


if __name__ == "__main__":
    main()
