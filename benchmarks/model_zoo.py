#!/usr/bin/env python
"""The shipped models: AP on photos and Stamps with intervals, threshold, parameters, and speed.

    python benchmarks/model_zoo.py --save                          # all, on all sets that are there
    python benchmarks/model_zoo.py --save nano-photos --tests coco coco_present
    python benchmarks/model_zoo.py --save nano-photos control=output/nano_photos_control

A model is the name of a shipped one, or NAME=RUN, where RUN is the folder of a run (its last
checkpoint) or a checkpoint in one. Each is evaluated on the sets of ``configs/eval/shipped.py``, as
`train_net.py --eval-only` does; then boxes are suppressed as `load_detector` does for the shipped
model (of a run: --nms). Intervals are 95 %, by bootstrap over images. The threshold is the one with
the best F1 on COCO photos asked for what they show. Then the models take turns with nano-dense on
one image, served as `load_detector` does, text cached (--repeats 0: not timed). What the results
have of other models or sets stays in them. On a set with names that were held out of training AP is
also that of those that have a near-synonym among the learnt, and of those that have none, and of
all there is the level of chance, see ``lib/novel.py``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from detectron2.config import instantiate
from dynamic_dino import load_detector
from dynamic_dino.checkpoint.weights import load_checkpoint
from dynamic_dino.config import load_config
from dynamic_dino.console import command
from dynamic_dino.data.builtin import BUILTIN
from dynamic_dino.data.datasets import load_datasets
from dynamic_dino.data.ground_truth import ground_truth
from dynamic_dino.engine.checkpointing import last_checkpoint
from dynamic_dino.engine.evaluate import do_test
from dynamic_dino.evaluation import (
    DatasetPredictions,
    Interval,
    best_point,
    bootstrap,
    coco_ap,
    operating_points,
)
from dynamic_dino.evaluation.coco import groups_of, read_ground_truth
from dynamic_dino.files import PACKAGE, configs_folder
from dynamic_dino.moe.parameters import count_parameters
from dynamic_dino.serving.shipped import SHIPPED_MODELS
from lib import tables as results
from lib.detectors import samples
from lib.interleaved import interleave, quartiles, timed
from lib.novel import asked_names, chance, held_out
from lib.options import add_machine, add_output, new_parser, place_output, use_threads
from lib.provenance import provenance, write_json
from torchvision.ops import batched_nms, box_convert

PACKAGES = ("torch", "triton", "timm", "transformers", "numpy", "faster-coco-eval")
REFERENCE = "nano-dense"  # what speeds are compared with
CLASSES, THRESHOLD = "coco", "coco_present"  # the sets of AP by class, and of the threshold
GRID = [n / 100 for n in range(1, 100)]  # thresholds that are tried


def find(model: str) -> tuple[str, Path, Path]:
    """Name, recipe and weights of a model; raises ValueError."""
    name, equals, place = model.partition("=")
    if not equals:
        if name not in SHIPPED_MODELS:
            raise ValueError(f"{name} is none of {', '.join(SHIPPED_MODELS)}")
        shipped = SHIPPED_MODELS[name]
        return name, configs_folder() / shipped.config, PACKAGE / "weights" / shipped.weights
    path = Path(place)
    weights = last_checkpoint(path) if path.is_dir() else path
    recipe = (path if path.is_dir() else path.parent) / "config.yaml"
    if not weights or not Path(weights).is_file() or not recipe.is_file():
        raise ValueError(f"{place} is no run with a checkpoint and a config.yaml")
    return name, recipe, Path(weights)


def evaluate(
    recipe: Path, weights: Path, output: Path, nms: float | None, options
) -> tuple[dict, dict]:
    """What is found out about a model on each set, and its parameter counts."""
    changes = [*options.overrides, f"train.output_dir={output}", f"train.device={options.device}"]
    cfg = load_config(configs_folder() / "eval/shipped.py", changes, recipe)
    for name in list(cfg.dataloader.test):
        if options.tests and name not in options.tests:
            del cfg.dataloader.test[name]
    model = instantiate(cfg.model).to(options.device)
    load_checkpoint(model, weights)
    scores, found = do_test(cfg, model), {}
    for name, loader in cfg.dataloader.test.items():
        if f"{name}/AP" not in scores:
            continue  # the set isn't there
        dataset, boxes = loader.dataset.names, predictions(output, name, nms)
        truth, mapper = read_ground_truth(ground_truth(dataset)), instantiate(loader.mapper)
        novel = held_out(truth, dataset, mapper)
        groups = groups_of(truth) | novel
        found[name] = {
            "dataset": dataset,
            "prompt_names": loader.mapper.prompt_names,
            "scores": as_rows(bootstrap(truth, boxes, samples=options.samples, groups=groups)),
        }
        if novel:
            asked = asked_names(dataset, mapper)
            found[name]["chance"] = as_rows(chance(truth, boxes, asked, novel))
            found[name]["names"] = by_name(truth, boxes, novel)
        if name in (CLASSES, THRESHOLD):
            points, _ = operating_points(truth, boxes, GRID)
            found[name]["curve"] = [asdict(point) for point in points[4::5]]
            found[name]["points"] = {point.threshold: point for point in points}
        if name == CLASSES:
            found[name]["classes"] = {
                row["name"]: {key: row[key] for key in ("objects", "AP50")}
                for row in coco_ap(truth, boxes).per_class
            }
    return found, count_parameters(model)


def by_name(truth: dict, boxes: DatasetPredictions, novel: dict[str, list]) -> dict[str, dict]:
    """Of each held-out name that has objects: how many, its AP50, and whether a near-synonym of it
    was learnt."""
    return {
        row["name"]: {
            "objects": row["objects"],
            "AP50": row["AP50"],
            "near_synonym": row["id"] in novel["_near"],
        }
        for row in coco_ap(truth, boxes).per_class
        if row["id"] in novel["_novel"]
    }


def training_data(recipe: Path) -> dict[str, dict]:
    """Of each data set that the recipe trains on: how much it has, its licence, and the share of
    the samples that come from it; {} where one of them isn't there."""
    loader = load_config(recipe).dataloader.train
    names = loader.dataset.names
    names = [names] if isinstance(names, str) else list(names)
    weights = loader.get("weights") or [1] * len(names)
    try:
        records = [load_datasets(name) for name in names]
    except FileNotFoundError:
        return {}
    return {
        name: {
            "images": len(found),
            "boxes": len(found.boxes),
            "names": len(np.unique(found.classes)),
            "licence": BUILTIN[name].licence,
            "share": weight / sum(weights),
        }
        for name, found, weight in zip(names, records, weights, strict=True)
    }


def suppressed_from(name: str, asked: float | None) -> float | None:
    """The overlap of a model: a shipped one has its own."""
    return SHIPPED_MODELS[name].nms if name in SHIPPED_MODELS else asked


def saved(output: Path, test: str) -> Path:
    return output / "evaluation" / test / "predictions.json"


def predictions(output: Path, test: str, nms: float | None) -> DatasetPredictions:
    """What was found, less the boxes that `load_detector` would suppress."""
    found = DatasetPredictions.read(saved(output, test))
    if nms is None or not len(found):
        return found
    _, image = np.unique(found.image_ids, return_inverse=True)
    names = torch.from_numpy(image * (found.category_ids.max() + 1) + found.category_ids)
    boxes = box_convert(torch.from_numpy(found.boxes), "xywh", "xyxy")
    kept = batched_nms(boxes, torch.from_numpy(found.scores), names, nms)
    return found[np.sort(kept.numpy())]


def as_rows(intervals: dict[str, Interval]) -> dict[str, dict]:
    return {metric: asdict(interval) for metric, interval in intervals.items()}


def chosen_points(tests: dict[str, dict]) -> dict[str, dict]:
    """Of each set with a curve the point of the threshold that is chosen on THRESHOLD; {} without
    that set. Takes the points out of `tests`."""
    points = {name: row.pop("points") for name, row in tests.items() if "points" in row}
    best = best_point(points.get(THRESHOLD, {}).values())
    return {name: asdict(row[best.threshold]) for name, row in points.items()} if best else {}


def differences(
    mine: tuple[Path, float | None],
    other: tuple[Path, float | None],
    tests: dict[str, dict],
    samples: int,
) -> dict[str, dict]:
    """Of each set that both were evaluated on: metric -> interval of the difference."""
    return {
        name: as_rows(
            bootstrap(
                ground_truth(row["dataset"]),
                *(predictions(output, name, nms) for output, nms in (mine, other)),
                samples=samples,
            )
        )
        for name, row in tests.items()
        if saved(other[0], name).is_file()
    }


def speeds(found: dict[str, tuple[Path, Path]], repeats: int, device: str) -> dict[str, dict]:
    """Name -> quartiles of the time of one image, all taking turns."""
    steps = {}
    for name, (recipe, weights) in found.items():
        detector = load_detector(recipe, weights, device=device)
        batch = samples((320, 320), device=device)

        def step(model=detector.model, batch=batch) -> float:
            with torch.inference_mode():
                return timed(lambda: model(batch), device)

        step()
        steps[name] = step
    return {name: quartiles(seconds) for name, seconds in interleave(steps, repeats).items()}


def plot(models: dict[str, dict], path: Path) -> None:
    """Precision over recall at each threshold, and the threshold that is the default."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    titles = {THRESHOLD: "asked for what the photo shows", CLASSES: "asked for all 80 names"}
    for axis, (test, title) in zip(axes, titles.items(), strict=True):
        for name, row in models.items():
            curve = [p for p in row["tests"].get(test, {}).get("curve", ()) if p["boxes"]]
            line = axis.plot(*([p[k] for p in curve] for k in ("recall", "precision")), ".-")
            if (point := row.get("threshold", {}).get(test)) and curve:
                axis.plot(point["recall"], point["precision"], "o", color=line[0].get_color())
                name = f"{name}: {point['threshold']:.2f}"
            if curve:
                line[0].set_label(name)
        axis.axhline(50, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=f"COCO photos, {title}", xlabel="recall, percent", ylim=(0, 100))
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("precision, percent")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@command
def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="default: all that are shipped")
    parser.add_argument("--tests", nargs="+", metavar="SET", help="default: all that are there")
    parser.add_argument("--against", metavar="NAME", help="also differences to this model's boxes")
    parser.add_argument("--nms", type=float, help="of a run; default: all boxes are kept")
    parser.add_argument("--samples", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--repeats", type=int, default=30, help="of the timing; 0: none")
    parser.add_argument(
        "--output", type=Path, default=Path("output/model_zoo"), help="folder of the predictions"
    )
    add_machine(parser)
    add_output(parser, plot=True)
    parser.add_argument(
        "--set", dest="overrides", nargs="+", default=[], metavar="key=value", help="of the recipe"
    )
    options = parser.parse_args()
    place_output(options, "model_zoo")
    use_threads(options)
    try:
        found = {name: rest for name, *rest in map(find, options.models or SHIPPED_MODELS)}
    except ValueError as error:
        parser.error(str(error))
    report = provenance(PACKAGES, options.device) | {"models": {}}
    if options.json and options.json.is_file():
        report["models"] = json.loads(options.json.read_text())["models"]
    of_run = {key: report[key] for key in ("machine", "commit", "command")}
    _, *reference = find(REFERENCE)
    times = {}
    if options.repeats:
        times = speeds({REFERENCE: reference} | found, options.repeats, options.device)
    for name, (recipe, weights) in found.items():
        output = options.output / name
        nms = suppressed_from(name, options.nms)
        tests, parameters = evaluate(recipe, weights, output, nms, options)
        content = weights.read_bytes()
        row = {
            "config": f"configs/{SHIPPED_MODELS[name].config}" if name in SHIPPED_MODELS else None,
            "weights": weights.name,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "nms": nms,
            "parameters": parameters,
        }
        if times:
            row["times"] = times[name]
            row["speed"] = times[REFERENCE]["median_ms"] / times[name]["median_ms"]
        before = report["models"].get(name, {})
        if before.get("sha256") != row["sha256"]:
            before = {}
        row["training"] = training_data(recipe) or before.get("training", {})
        row["threshold"] = chosen_points(tests) or before.get("threshold", {})
        tests = {test: of_run | result for test, result in tests.items()}
        if options.against and options.against != name:
            other = options.output / options.against, suppressed_from(options.against, options.nms)
            row["differences"] = {
                "to": options.against,
                "tests": differences((output, nms), other, tests, options.samples),
            }
        row["tests"] = before.get("tests", {}) | tests
        report["models"][name] = before | row
        if options.json:  # after each: the next may take long
            write_json(options.json, report)
    if options.plot:
        plot(report["models"], options.plot)
    for table in (
        results.model_zoo,
        results.model_zoo_sets,
        results.model_zoo_novel,
        results.model_zoo_thresholds,
    ):
        print(table(report))


if __name__ == "__main__":
    main()
