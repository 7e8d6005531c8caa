#!/usr/bin/env python
"""What the experts of the shipped nano model do on Stamps, in numbers and two pictures.

    python -m dynamic_dino.analysis --dataset stamps_val --dataset stamps_val_novel \\
        --dataset stamps_val_real --against nano-dense --output output/experts
    python benchmarks/expert_analysis.py output/experts

takes the numbers from a finished report and puts them into results/cpu, with where they come from.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from lib.provenance import provenance, results_folder, write_json
from PIL import Image

NAME = "expert_analysis"


def read_table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def numbers_of(folder: Path) -> dict:
    """Per data set the numbers of the model and of every layer; correlations between data sets."""
    datasets = {}
    for dataset, models in json.loads((folder / "numbers.json").read_text()).items():
        [(model, numbers)] = models.items()
        told = read_table(folder / f"{dataset}_names-information.csv")
        datasets[dataset] = {
            "model": {k: v for k, v in numbers.items() if ":" not in k},
            "layers": {
                row["layer"]: {
                    key.split(": ")[1]: value
                    for key, value in numbers.items()
                    if key.startswith(f"{row['layer']}: ")
                }
                | {
                    "information of names": float(row["information"]),
                    "with shuffled names": float(row["with shuffled names"]),
                }
                for row in told
            },
        }
    stability = [
        row | {"correlation": float(row["correlation"])}
        for row in read_table(folder / "stability.csv")
    ]
    return {"model": model, "datasets": datasets, "stability": stability}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path, help="folder of a report on several data sets")
    parser.add_argument("--drop", type=Path, help="folder of a report with --drop, of one data set")
    options = parser.parse_args(arguments)
    report = provenance(("torch", "numpy", "faster-coco-eval")) | numbers_of(options.report)
    if options.drop:
        report["drop"] = [
            {k: float(v) if v and k not in ("layer", "dropped") else v for k, v in row.items()}
            for row in read_table(options.drop / "drop.csv")
        ]
    folder = results_folder()
    write_json(folder / f"{NAME}.json", report)
    first = next(iter(report["datasets"]))
    for source, target in ((f"{first}_coselection", NAME), (f"{first}_tokens", f"{NAME}_tokens")):
        image = Image.open(options.report / f"{source}.png")
        if image.mode == "RGB":  # photos
            image.resize((900, round(image.height * 900 / image.width))).save(
                folder / f"{target}.jpg", quality=80, optimize=True
            )
        else:
            image.save(folder / f"{target}.png", optimize=True)
    print(f"{folder / NAME}.json")


if __name__ == "__main__":
    main()
