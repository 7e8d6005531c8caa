#!/usr/bin/env python
"""What a few photos bring: the shipped dense detector tuned on 10, 50 and all images of a data set,
as it is, as 16 experts (MoE-Tuning), and as their control, the same parts of the dense model.

    python benchmarks/few_shot.py --data ROOT                 # what isn't done yet
    python benchmarks/few_shot.py --data ROOT --sets Raccoon --images 10 all --models dense x16
    python benchmarks/few_shot.py --data ROOT --sets mine     # ROOT/mine, in any format

The images are drawn by seed and show as many names as they can; those of 10 are among those of 50,
and with the same seed all models get the same ones, in the same order. Length and rate are those of
finetune.py, but for --most iterations. Every set's features are computed once. Each finished run is
kept in benchmarks/results/<machine>/few_shot.json; the same command goes on with the others.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from dynamic_dino.config import ConfigError
from dynamic_dino.data.catalog import dataset_root
from dynamic_dino.data.datasets import get_metadata, load_own_data
from dynamic_dino.data.ground_truth import coco_dictionary
from dynamic_dino.files import write_text
from dynamic_dino.finetune.plan import Start, find_start, recipe_for
from dynamic_dino.finetune.rule import iterations_for
from dynamic_dino.finetune.run import Data, build_features, evaluate_start, read_features, tune
from dynamic_dino.sources import is_hub_spec, resolve
from lib import tables as results
from lib.options import add_machine, new_parser, use_threads
from lib.provenance import provenance, results_folder, write_json
from lib.shots import covering_order
from omegaconf import DictConfig

PACKAGES = ("torch", "transformers", "timm", "numpy", "scipy", "faster-coco-eval")
SETS = {"Raccoon": "odinw/Raccoon", "groceries": "photos/groceries"}  # below the data's root
MODELS = {"dense": "tuned", "x16": "x16", "control": "control"}  # kinds of finetune.plan
ALL = "all"


@dataclass(frozen=True)
class Run:
    set: str
    images: int | str  # a number, or "all"
    seed: int
    model: str

    @property
    def key(self) -> str:
        return f"{self.set}, {self.images} images, seed {self.seed}, {self.model}"


class Set:
    """A data set, its features and the score of what tuning starts from."""

    def __init__(self, name: str, options: argparse.Namespace, start: Start) -> None:
        self.name, self.options, self.start = name, options, start
        self.path = options.data / SETS.get(name, name)
        self.folder = options.work / name
        [train], [val] = (load_own_data(f"{self.path}:{part}") for part in ("train", "val"))
        self.train = train.select(np.flatnonzero(train.with_objects()))
        self.val = val
        data = Data(self.train, val, f"{self.path}:val")
        build_features(self.recipe("tuned"), data, self.folder / "features")

    def recipe(self, kind: str, photos: int = 1, run: Run | None = None) -> DictConfig:
        seed = run.seed if run else 0
        cfg = recipe_for(
            self.start,
            kind,
            str(self.path),
            self.folder / (kind if run is None else run.key.replace(", ", "-").replace(" ", "_")),
            device=self.options.device,
            photos=photos,
            iterations=min(iterations_for(photos), self.options.most),
            overrides=[
                f"train.seed={seed}",
                f"dataloader.train.seed={seed}",
                f"dataloader.train.num_workers={self.options.workers}",
                *self.options.overrides,
            ],
        )
        cfg.train.checkpointer.period = cfg.train.max_iter + 1  # minutes: they start again
        return cfg

    def before(self) -> dict:
        cfg = self.recipe("tuned")
        read_features(cfg, self.folder / "features")
        folder = self.folder / "before"
        shutil.rmtree(folder, ignore_errors=True)  # of other weights, perhaps
        evaluate_start(cfg, folder)
        return scores_of(folder)

    def run(self, run: Run) -> dict:
        """Tunes on the shots of a run; how long it took, and its scores."""
        rows = covering_order(self.train, run.seed)
        rows = rows if run.images == ALL else rows[: run.images]
        shots = self.train.select(rows)
        file = self.folder / f"shots-{run.images}-seed{run.seed}.json"
        metadata = get_metadata(f"{self.path}:train")
        write_text(file, json.dumps(coco_dictionary(shots, metadata)))
        cfg = self.recipe(MODELS[run.model], len(shots), run)
        cfg.data.train_json, cfg.data.train_images = str(file), shots.image_root
        read_features(cfg, self.folder / "features")
        folder = Path(cfg.train.output_dir)
        shutil.rmtree(folder, ignore_errors=True)
        wall, cpu = time.perf_counter(), time.process_time()
        tune(cfg)
        found = {
            "photos": len(shots),
            "names": len(set(shots.classes.tolist())),
            "iterations": cfg.train.max_iter,
            "batch": cfg.dataloader.train.total_batch_size,
            "rate": cfg.optimizer.lr,
            "seconds": round(time.perf_counter() - wall, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "scores": scores_of(folder),
        }
        shutil.rmtree(folder)  # 40 MB and more
        return found


def scores_of(folder: Path) -> dict[str, float]:
    scores = json.loads((folder / "results.json").read_text())
    return {metric: round(scores[f"val/{metric}"], 3) for metric in ("AP", "AP50")}


def fingerprint(start: Start) -> str:
    """Of the weights: results of others don't belong into the same file."""
    path = resolve(start.weights)
    if path.is_dir() or is_hub_spec(start.weights):
        return start.weights
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def read_report(path: Path, settings: dict) -> dict:
    """What is done; raises SystemExit where it was done with other settings."""
    if not path.is_file():
        return {"settings": settings, "before": {}, "runs": {}}
    report = json.loads(path.read_text())
    if report["settings"] != settings:
        raise SystemExit(
            f"{path} has results of {report['settings']}, not of {settings}: delete it to start "
            "anew, or name another file with --out"
        )
    return report


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--data", type=Path, help="root of the sets (default: of the data sets)")
    parser.add_argument("--sets", nargs="+", default=[*SETS], help="default: %(default)s")
    parser.add_argument(
        "--images", nargs="+", type=_count, default=[10, 50, ALL], help="default: 10 50 all"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=[*MODELS], help="default: all three"
    )
    parser.add_argument("--start", metavar="MODEL", help="as in finetune.py")
    parser.add_argument(
        "--most", type=int, default=200, metavar="N", help="iterations (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=0, help="that load data (default: 0)")
    parser.add_argument("--work", type=Path, default=Path("output/few_shot"), help="folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: few_shot.json, above")
    parser.add_argument("--dry-run", action="store_true", help="print what is left to do")
    parser.add_argument("--override", dest="overrides", action="append", default=[])
    add_machine(parser)
    options = parser.parse_args(arguments)
    options.data = options.data or dataset_root()
    options.out = options.out or results_folder(options.device) / "few_shot.json"
    return options


def _count(text: str) -> int | str:
    if text == ALL:
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of images nor 'all'")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    use_threads(options)
    try:
        return run_all(options)
    except (ConfigError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_all(options: argparse.Namespace) -> int:
    start = find_start(options.start, options.device)
    settings = {"start": start.name, "weights": fingerprint(start), "most": options.most}
    if options.overrides:
        settings["overrides"] = options.overrides
    report = read_report(options.out, settings)
    # Seed by seed and with models innermost, so that pairs come early.
    wanted = [
        Run(name, images, seed, model)
        for name in options.sets
        for seed in options.seeds
        for images in options.images
        for model in options.models
    ]
    left = [run for run in wanted if run.key not in report["runs"]]
    if options.dry_run:
        print(*(run.key for run in left), sep="\n")
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    with (options.work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(
                f"another few_shot.py works in {options.work}: wait for it, or name other places "
                "with --work and --out"
            ) from None
        return tune_all(left, report, options, start)


def tune_all(left: Sequence[Run], report: dict, options: argparse.Namespace, start: Start) -> int:
    sets: dict[str, Set] = {}
    for number, run in enumerate(left, start=1):
        if run.set not in sets:
            sets = {run.set: Set(run.set, options, start)}
        if run.set not in report["before"]:
            report["before"][run.set] = sets[run.set].before()
        print(f"\n[{number}/{len(left)}] {run.key}", flush=True)
        report["runs"][run.key] = {
            "set": run.set,
            "images": run.images,
            "seed": run.seed,
            "model": run.model,
            **sets[run.set].run(run),
        }
        write_json(options.out, provenance(PACKAGES, options.device) | report)
        print(report["runs"][run.key]["scores"], flush=True)
    print(results.few_shot(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
