"""The command that scores saved predictions."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..console import command, program
from ..data.datasets import locate_dataset
from ..data.ground_truth import ground_truth
from ..files import write_text
from .bootstrap import bootstrap
from .coco import groups_of, ids_of, read_ground_truth
from .operating_point import operating_points
from .predictions import DatasetPredictions
from .protocols import DEFAULTS, PROTOCOLS, protocol_named
from .tables import format_results

DESCRIPTION = """
Scores saved detections, of this project or of any other, against a data set.

PREDICTIONS is a COCO results file: a list of {"image_id", "category_id", "bbox": [x, y, width,
height] in pixels of the original image, "score"}. Evaluations of train_net.py write one to
OUTPUT/evaluation/NAME/predictions.json. Or it is the predictions.json of predict.py, whose images
are those of the data set by their file names, and whose phrases its names: detect with --threshold
0, since AP counts detections of low scores too.

protocols
  coco        COCO AP: the 100 best detections of each image and class
  lvis        LVIS AP: federated; the 300 best detections of each image
  lvis-fixed  fixed AP: federated; the 10,000 best detections of each class over all images. Give it
              all detections, not 300 an image
  refexp      P@1, P@5, P@10 of referring expressions
"""

EXAMPLES = """
examples
  %(prog)s predictions.json --dataset coco_2017_val
  %(prog)s predictions.json --dataset coco_2017_val --operating-point 0.2
  %(prog)s new.json --dataset coco_2017_val --bootstrap 1000 \\
      --against old.json
  %(prog)s predictions.json --dataset lvis_v1_minival --protocol lvis
  %(prog)s predictions.json --dataset my/annotations.json --json out.json
"""


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=program(),
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("predictions", metavar="PREDICTIONS", type=Path)
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="NAME_OR_PATH",
        help="a registered data set, under DETECTRON2_DATASETS, or the path of a file or folder",
    )
    parser.add_argument(
        "--protocol",
        metavar="NAME",
        help=f"{', '.join(PROTOCOLS)}, or the import path of your own; default: lvis-fixed for "
        "LVIS's files, refexp for referring expressions, else coco",
    )
    parser.add_argument(
        "--max-dets", type=int, help="detections that count, in place of the protocol's own number"
    )
    parser.add_argument(
        "--operating-point",
        type=float,
        nargs="+",
        default=[],
        metavar="SCORE",
        help="also precision and recall of all boxes from this score on, at IoU 0.5, and the score "
        "with the best F1 (protocol coco)",
    )
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=0,
        metavar="SAMPLES",
        help="also 95 %% intervals of AP and AP50 over this many drawings of the images; 1000 are "
        "usual (protocol coco)",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="PREDICTIONS",
        help="with --bootstrap also those of the difference to these predictions, of the same data "
        "set",
    )
    parser.add_argument("--classes", type=int, default=60, help="show this many (default: 60)")
    parser.add_argument(
        "--coco-results",
        type=Path,
        metavar="FILE",
        help="write the predictions to this file as COCO results, with the data set's ids",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    args = parser.parse_args(arguments)
    try:
        if args.against and not args.bootstrap:
            raise ValueError("--against is for the intervals of --bootstrap: add --bootstrap 1000")
        results = score(
            args.predictions,
            args.dataset,
            args.protocol,
            args.max_dets,
            args.operating_point,
            args.bootstrap,
            args.against,
            args.coco_results,
        )
        if args.json:
            write_text(args.json, json.dumps(results, indent=1))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(format_results(results, args.classes))
    return 0


def score(
    predictions: str | Path,
    dataset: str,
    protocol: str | None = None,
    max_dets: int | None = None,
    thresholds: Sequence[float] = (),
    samples: int = 0,
    against: str | Path | None = None,
    coco_results: Path | None = None,
) -> dict:
    """The content of an evaluation's results.json, of saved predictions. All images count.

    With `thresholds` also "operating_points": "at", those of the thresholds, and "best", see
    `operating_points`. With `samples` also "intervals", {metric: {"value", "low", "high"}}, and
    where there are predictions `against`, "differences" to them, see `bootstrap`.

    With `coco_results` writes the predictions to this file as COCO results.

    Raises FileNotFoundError or ValueError naming the file, the field and the remedy.
    """
    if dataset in DatasetCatalog:
        source = MetadataCatalog.get(dataset).json_file
    else:
        place = locate_dataset(dataset)
        plain = place.format in ("coco", "mdetr") and place.drawn is None
        source = place.file if plain else ground_truth(dataset)
    truth = read_ground_truth(source)
    name = protocol or DEFAULTS.get(_kind(truth), "coco")
    chosen = protocol_named(name)
    max_dets = chosen.max_dets if max_dets is None else max_dets
    for what, wanted in (("an operating point", thresholds), ("the bootstrap", samples)):
        if wanted and name != "coco":
            raise ValueError(
                f"{what} is defined where every object is annotated, not by {name}: use --protocol "
                "coco"
            )
    predictions = DatasetPredictions.read(predictions, truth)
    if against is not None:
        against = DatasetPredictions.read(against, truth)
    if coco_results is not None:
        predictions.write(coco_results)
    result = chosen.score(
        truth,
        predictions,
        max_dets=max_dets,
        groups=groups_of(truth),
        image_ids=None,
    )
    marks = {
        c["id"]: {k: c[k] for k in ("frequency", "novel") if k in c} for c in truth["categories"]
    }
    more = {}
    if thresholds:
        at, best = operating_points(truth, predictions, thresholds)
        more["operating_points"] = {
            "at": [asdict(point) for point in at],
            "best": asdict(best) if best else None,
        }
    if samples:
        options = {"samples": samples, "max_dets": max_dets}
        found = {"intervals": bootstrap(truth, predictions, **options)}
        if against is not None:
            found["differences"] = bootstrap(truth, predictions, against, **options)
        more |= {what: {k: asdict(v) for k, v in row.items()} for what, row in found.items()}
    return {
        "dataset": dataset,
        "protocol": name,
        "images": len(ids_of(truth)[0]),
        "objects": sum(row["objects"] for row in result.per_class),
        "max_dets": max_dets,
        "metrics": result.metrics,
        "routing": [],
        "per_class": [row | marks[row["id"]] for row in result.per_class],
        **more,
    }


def _kind(truth: dict) -> str:
    """What a data set with this annotation file is called in metadata ("evaluator_type")."""
    first = truth["images"][0] if truth["images"] else {}
    return "lvis" if "neg_category_ids" in first else "refexp" if "caption" in first else "coco"
