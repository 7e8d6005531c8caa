"""What tuning has changed: the table of before and after, and pictures of the largest changes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tabulate import tabulate

from ..data.boxes import corners
from ..data.images import read_image
from ..data.visualization import contact_sheet, draw_boxes
from ..evaluation.bootstrap import Interval, bootstrap
from ..evaluation.matching import match
from ..evaluation.operating_point import operating_points
from ..evaluation.predictions import DatasetPredictions

SAMPLES = 500  # of the bootstrap
MANY = 40  # names; of more, the table shows those that changed most
BEFORE = "before"


@dataclass(frozen=True)
class Scores:
    """What an evaluation left in its folder.

    threshold  that of the best F1 over all classes, rounded down to a hundredth
    """

    metrics: dict[str, float]
    per_class: list[dict]
    predictions: DatasetPredictions
    threshold: float


def read_scores(folder: Path, truth: dict) -> Scores:
    """Of the folder of a `DetectionEvaluator`; `truth` is what `read_ground_truth` returns."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    predictions = DatasetPredictions.read(folder / "predictions.json")
    _, best = operating_points(truth, predictions, [])
    threshold = int(100 * best.threshold) / 100 if best else 0.0
    return Scores(results["metrics"], results["per_class"], predictions, threshold)


# ---- the table ----------------------------------------------------------------------------------


def gains(truth: dict, scores: Mapping[str, Scores]) -> dict[str, dict[str, Interval]]:
    """Run -> metric -> its gain over `BEFORE`, with an interval over images."""
    before = scores[BEFORE].predictions
    return {
        name: bootstrap(truth, after.predictions, before, samples=SAMPLES)
        for name, after in scores.items()
        if name != BEFORE
    }


def table(
    truth: dict, scores: Mapping[str, Scores], found: Mapping[str, Mapping[str, Interval]]
) -> str:
    """AP and AP50 of each run with its gain, then AP50 of each name that has boxes, in percent."""
    images, boxes = len(truth["images"]), sum(not a["iscrowd"] for a in truth["annotations"])
    rows = []
    for name, run in scores.items():
        cells = [_percent(run.metrics[metric]) for metric in ("AP", "AP50")]
        change = [
            f"{g.value:+.1f} ({g.low:+.1f} to {g.high:+.1f})"
            if (g := found.get(name, {}).get(metric))
            else ""
            for metric in ("AP", "AP50")
        ]
        rows.append([name, cells[0], change[0], cells[1], change[1], f"{run.threshold:.2f}"])
    head = ["", "AP", "gain (95 %)", "AP50", "gain (95 %)", "best threshold"]
    text = f"{images} validation photos, {boxes} boxes; percent\n"
    text += _table(rows, head) + "\n"
    of_class = {
        name: {row["id"]: row for row in run.per_class if row["objects"]}
        for name, run in scores.items()
    }
    known = list(of_class[BEFORE].values())
    title = "AP50 of each name"
    if len(known) > MANY:
        last = list(of_class.values())[-1]
        known.sort(key=lambda row: -abs(last[row["id"]]["AP50"] - row["AP50"]))
        title += f", the {MANY} of {len(known)} that changed most"
        known = known[:MANY]
    known.sort(key=lambda row: -row["objects"])
    rows = [
        [
            row["name"],
            row["objects"],
            *(_percent(classes[row["id"]]["AP50"]) for classes in of_class.values()),
        ]
        for row in known
    ]
    return text + f"\n{title}\n" + _table(rows, ["name", "boxes", *of_class])


def _table(rows: list[list], head: list[str]) -> str:
    align = ["left"] + ["right"] * (len(head) - 1)
    return tabulate(rows, head, tablefmt="github", disable_numparse=True, colalign=align)


def _percent(value: float) -> str:
    return "-" if value < 0 else f"{value:.1f}"


# ---- pictures -----------------------------------------------------------------------------------


def f1_of_images(
    truth: dict, predictions: DatasetPredictions, threshold: float
) -> dict[int | str, float]:
    """Image -> harmonic mean of precision and recall at IoU 0.5 of the boxes from `threshold` on,
    in [0, 1]; 1 where there is nothing to find and nothing is found."""
    shown = predictions[predictions.scores >= threshold]
    right, counts = match(truth, shown, [0.5])
    hits: dict = defaultdict(int)
    total: dict = defaultdict(int)  # boxes that count, and objects
    for image, hit, count in zip(shown.image_ids.tolist(), right[0], counts[0], strict=True):
        hits[image] += int(hit)
        total[image] += int(count)
    for annotation in truth["annotations"]:
        total[annotation["image_id"]] += not annotation["iscrowd"]
    return {
        i: 2 * hits[i] / total[i] if total[i] else 1.0 for i in (m["id"] for m in truth["images"])
    }


def changes_sheet(
    truth: dict,
    before: Scores,
    after: Scores,
    files: Mapping[int | str, str],
    names: Mapping[int, str],
    count: int = 4,
) -> tuple[np.ndarray | None, int, int]:
    """The photos with the largest gain and the largest loss of F1, a row each: before, after, and
    the boxes that were annotated. Each detector at its own best threshold.

    Args:
        files: image id -> file; names: category id -> phrase.
        count: of gains, and of losses, at most.

    Returns uint8 [H, W, 3], RGB, or None where no photo has changed; how many photos have gained,
    and how many have lost.
    """
    old, new = (f1_of_images(truth, s.predictions, s.threshold) for s in (before, after))
    change = {image: new[image] - old[image] for image in old if image in files}
    order = sorted(change, key=lambda image: -change[image])
    gained = [image for image in order if change[image] > 1e-9]
    lost = [image for image in reversed(order) if change[image] < -1e-9]
    objects = defaultdict(list)
    for annotation in truth["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    pictures, captions = [], []
    for image in [*gained[:count], *lost[:count]]:
        pixels = read_image({"file_name": files[image]})
        for title, scores, f1 in (("before", before, old), ("after", after, new)):
            mine = scores.predictions
            mine = mine[(mine.image_ids == image) & (mine.scores >= scores.threshold)]
            mine = mine[np.argsort(-mine.scores, kind="stable")]
            phrases = [names[c] for c in mine.category_ids.tolist()]
            pictures.append(
                draw_boxes(pixels, corners(mine.boxes).tolist(), phrases, mine.scores.tolist())
            )
            what = "gain" if change[image] > 0 else "loss"
            captions.append(f"{title}, F1 {f1[image]:.2f} ({what})")
        annotated = objects[image]
        boxes = corners(np.array([a["bbox"] for a in annotated])).tolist()
        phrases = [names[a["category_id"]] for a in annotated]
        pictures.append(draw_boxes(pixels, boxes, phrases))
        captions.append(f"truth: {Path(files[image]).name}")
    sheet = contact_sheet(pictures, 3, captions) if pictures else None
    return sheet, len(gained), len(lost)
