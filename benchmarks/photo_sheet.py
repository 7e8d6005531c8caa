#!/usr/bin/env python
"""The picture of the README: what the default model finds in twelve photos that anyone may show.

    python benchmarks/photo_sheet.py                   # benchmarks/results/cpu/shipped_photos.jpg
    python benchmarks/photo_sheet.py --model output/nano_photos --out sheet.jpg

Photos of Stamps' val_real in the public domain; which of them, `dynamic_dino.demo.draw_photos`
says.
"""

from __future__ import annotations

import json
from pathlib import Path

from detectron2.data import MetadataCatalog
from dynamic_dino import load_detector
from dynamic_dino.data.datasets import load_datasets
from dynamic_dino.demo import draw_photos
from dynamic_dino.serving.shipped import DEFAULT_MODEL
from lib.options import new_parser
from lib.provenance import results_folder

DATASET = "stamps_val_real"


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="as load_detector takes it")
    parser.add_argument("--weights", help="of a recipe, or another checkpoint of a run")
    parser.add_argument("--threshold", type=float, help="default: the model's")
    parser.add_argument("--out", type=Path, default=results_folder() / "shipped_photos.jpg")
    options = parser.parse_args()
    records = load_datasets(DATASET)
    annotations = json.loads(Path(MetadataCatalog.get(DATASET).json_file).read_text())
    free = {
        image["id"]
        for image in annotations["images"]
        if image["licence"].lower() in ("public domain", "cc0-1.0")
    }
    records = [record for record in records if record["image_id"] in free]
    detector = load_detector(options.model, options.weights, threshold=options.threshold)
    draw_photos(detector, records, 12, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
