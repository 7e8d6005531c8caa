#!/usr/bin/env python
"""An evaluation by fixed AP at LVIS's size, generated: its log, its scores, the memory it takes.

    python benchmarks/lvis_evaluation.py                    # 100 images, minutes
    python benchmarks/lvis_evaluation.py --save             # ... kept in benchmarks/results/cpu/
    python benchmarks/lvis_evaluation.py --processes 2

Of LVIS's val (19,809 images, 1,203 names in 31 chunks, the 300 best of each) as many images as are
asked for, and of the 10,000 detections of a class that count the same part. What the detector
would find is random: some objects, and 300 pairs of a box and a name for each chunk. "boxes of 100
queries": pairs share boxes, as the nano model's do; "each its own box": none do, the most that a
log can take. Scores are those of no detector; how many are left depends on their order only.

Each is evaluated with a log that holds all detections and with one that leaves out what can't count
any more; then once more from the second log alone, as after an interruption. The scores of all
three must be the same, and the predictions, to the last digit.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from detectron2.structures import Boxes, Instances
from dynamic_dino.console import command
from dynamic_dino.data.datasets import register_coco_json
from dynamic_dino.evaluation import DetectionEvaluator, PredictionLog, class_floors, evaluator
from dynamic_dino.evaluation.lvis import PER_CLASS
from lib.options import add_output, new_parser, place_output
from lib.provenance import provenance, settings, write_json

LVIS_VAL, NAMES, CHUNK, FOUND, SIZE = 19_809, 1203, 40, 300, 640
QUERIES = {"boxes of 100 queries": 100, "each its own box": FOUND}
OBJECTS, BATCH = 12, 4


def truth(images: int, seed: int) -> dict:
    """Objects, and names that an image is known not to show, as in LVIS."""
    rng, content = np.random.default_rng(seed), {"images": [], "annotations": []}
    content["categories"] = [{"id": i + 1, "name": f"name {i}"} for i in range(NAMES)]
    for i in range(images):
        negative = (1 + rng.choice(NAMES, min(20, NAMES), replace=False)).tolist()
        image = {"id": i, "file_name": f"{i}.jpg", "height": SIZE, "width": SIZE}
        image |= {"neg_category_ids": negative, "not_exhaustive_category_ids": negative[:2]}
        content["images"].append(image)
        for _ in range(OBJECTS):
            corner, size = rng.uniform(0, SIZE / 2, 2), rng.uniform(10, SIZE / 2, 2)
            annotation = {"image_id": i, "category_id": int(rng.integers(1, NAMES + 1))}
            annotation |= {"bbox": [*corner.tolist(), *size.tolist()]}
            content["annotations"].append({"id": len(content["annotations"]) + 1} | annotation)
    return content


def detected(image: int, objects: list[dict], queries: int, seed: int) -> Instances:
    """FOUND pairs of a query's box and a name of each chunk, best first, and every other object."""
    rng, boxes, classes = np.random.default_rng([seed, image]), [], []
    for start in range(0, NAMES, CHUNK):
        corner, size = (
            rng.uniform(0, SIZE / 2, (queries, 2)),
            rng.uniform(5, SIZE / 2, (queries, 2)),
        )
        of_queries = np.concatenate([corner, corner + size], 1)
        pairs = rng.permutation(queries * min(CHUNK, NAMES - start))[:FOUND]
        if queries == FOUND:  # each has one name
            pairs = np.arange(FOUND) + FOUND * rng.integers(0, min(CHUNK, NAMES - start), FOUND)
        boxes.append(of_queries[pairs % queries])
        classes.append(start + pairs // queries)
    scores = rng.random(sum(map(len, classes)))
    for k, a in enumerate(objects[::2]):
        x, y, w, h = np.array(a["bbox"]) + rng.normal(0, 4, 4)
        boxes[0][k], classes[0][k] = (x, y, x + w, y + h), a["category_id"] - 1
        scores[k] = rng.uniform(0.9, 1)
    found = Instances((SIZE, SIZE))
    order = np.concatenate([np.argsort(-s) + i for s, i in _chunks(scores)])
    found.pred_boxes = Boxes(torch.from_numpy(np.concatenate(boxes)[order]).float())
    found.pred_classes = torch.from_numpy(np.concatenate(classes)[order])
    found.scores = torch.from_numpy(scores[order]).float()
    return found


def _chunks(scores: np.ndarray) -> list[tuple[np.ndarray, int]]:
    return [(scores[i : i + FOUND], i) for i in range(0, len(scores), FOUND)]


def evaluate(
    rank: int, options: argparse.Namespace, folder: Path, kind: str, cut: bool, run: str
) -> None:
    """One process's part; the main one writes what came of it to RUN.json."""
    if options.processes > 1:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store {run}",
            rank=rank,
            world_size=options.processes,
        )
    torch.set_num_threads(1)
    part = options.images / LVIS_VAL
    evaluator.PRUNE_EVERY = round(evaluator.PRUNE_EVERY * part)
    if not cut:
        class_floors.ClassFloors.reached = lambda self, found: np.ones(len(found), bool)
    name = f"generated {kind}"
    register_coco_json(name, folder / "truth.json", folder)
    log = PredictionLog(folder / f"log {kind} {cut}", {"generated": kind})
    scored = DetectionEvaluator(
        name, folder / run, protocol="lvis-fixed", max_dets=max(1, round(PER_CLASS * part))
    )
    scored.use_log(log)
    scored.reset()
    objects: dict[int, list[dict]] = {}
    for a in json.loads((folder / "truth.json").read_text())["annotations"]:
        objects.setdefault(a["image_id"], []).append(a)
    mine = [i for i in range(rank, options.images, options.processes) if i not in log.done]
    seconds = 0.0
    for start in range(0, len(mine), BATCH):
        images = mine[start : start + BATCH]
        samples = [{"image_id": i, "prompt_classes": range(NAMES)} for i in images]
        outputs = [
            {"instances": detected(i, objects[i], QUERIES[kind], options.seed)} for i in images
        ]
        before = time.process_time()
        scored.process(samples, outputs)
        seconds += time.process_time() - before
    before = time.process_time()
    metrics = scored.evaluate()
    if rank == 0:
        report = {
            "metrics": metrics,
            "log_bytes": sum(path.stat().st_size for path in log.folder.glob("*.log")),
            "process_ms_per_image": 1e3 * seconds / max(1, len(mine)),
            "evaluate_s": time.process_time() - before,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        (folder / f"{run}.json").write_text(json.dumps(report))
    if options.processes > 1:
        torch.distributed.destroy_process_group()


def measure(options: argparse.Namespace, folder: Path, kind: str) -> dict:
    (folder / "truth.json").write_text(json.dumps(truth(options.images, options.seed)))
    runs = {"all": False, "cut": True, "resumed": True}
    reports, predictions = {}, set()
    for run, cut in runs.items():
        # processes of their own, whose memory is theirs
        mp.start_processes(
            evaluate, (options, folder, kind, cut, run), options.processes, start_method="fork"
        )
        reports[run] = json.loads((folder / f"{run}.json").read_text())
        predictions.add((folder / run / "predictions.json").read_bytes())
    scores = [report.pop("metrics") for report in reports.values()]
    if len(predictions) > 1 or scores != scores[:1] * len(scores):
        raise SystemExit(f"{kind}: the three runs have other scores or predictions: {scores}")
    for report in reports.values():
        report["lvis_val_gb"] = report["log_bytes"] / options.images * LVIS_VAL / 1e9
    return {"detections": kind, "AP": scores[0]["AP"], **reports}


@command
def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1, help="that share the images")
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser)
    options = parser.parse_args(arguments)
    place_output(options, "lvis_evaluation")
    report = provenance(("torch", "numpy")) | {"settings": settings(options), "rows": []}
    for kind in QUERIES:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(options, Path(folder), kind)
        report["rows"].append(row)
        print(f"{kind}: three times AP {row['AP']!r}, and the same predictions")
        for run in ("all", "cut"):
            of_it, gb = row[run], row[run]["lvis_val_gb"]
            print(
                f"  log of {run}: {of_it['log_bytes'] / 1e6:.2f} MB, of LVIS's val {gb:.2f} GB; "
                f"{of_it['process_ms_per_image']:.1f} ms CPU an image, "
                f"main process at most {of_it['peak_mb']:.0f} MB",
                flush=True,
            )
        if options.json:
            write_json(options.json, report)


if __name__ == "__main__":
    main()
