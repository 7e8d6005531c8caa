"""The steps of fine-tuning on a user's own data; each leaves its results in the output folder.

plan.json        what was decided; goes on only with the same
features/        of the frozen backbone, where they are cached
before/          the evaluation of what tuning starts from
tuned/, x16/, control/    runs of `engine.train.do_train`
results.txt, results.json, changes.jpg
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from PIL import Image

from ..checkpoint.weights import load_checkpoint
from ..config import ConfigError, build, input_errors
from ..console import headline, some
from ..data.check import CheckResult, check_dataset
from ..data.datasets import get_metadata, load_own_data
from ..data.feature_cache import build_feature_cache, module_fingerprint
from ..data.ground_truth import ground_truth
from ..data.problems import BOX_KINDS
from ..data.records import Records
from ..engine.checkpointing import last_checkpoint
from ..engine.evaluate import do_test, load_for_evaluation
from ..engine.preemption import noted_signals
from ..engine.setup import LOGGERS, resolve_device, setup, sole_run
from ..engine.train import do_train
from ..evaluation.coco import read_ground_truth
from ..evaluation.evaluator import category_ids_of
from ..files import write_text
from .plan import TITLES, Start, caching_pays, find_start, recipe_for
from .report import BEFORE, Scores, changes_sheet, gains, read_scores, table
from .rule import iterations_for

CHECKED = 2000  # images that are opened, before training, to see whether they can be
NAMES = 12  # of those that some data lack, in a message
SURE = 30  # validation photos; with fewer, little can be said
SAID = ("dynamic_dino.engine.printer", "dynamic_dino.engine.checkpointing")


@dataclass(frozen=True)
class Options:
    """What is asked for; None leaves it to the rule of `plan`.

    data       whatever `data.source` takes
    kinds      of `plan.TITLES`, in the order in which they are trained
    """

    data: str
    output: Path
    start: str | None = None
    kinds: tuple[str, ...] = ("tuned",)
    iterations: int | None = None
    epochs: float | None = None
    device: str = "auto"
    cache: bool = True
    resume: bool = False
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Data:
    """train: photos that show an object; val, with the name of that part."""

    train: Records
    val: Records
    val_name: str

    @property
    def photos(self) -> int:
        return len(self.train)


def finetune(options: Options) -> dict[str, Scores]:
    """All steps; returns the scores of the start and of each run.

    Raises `ConfigError` where it can't go on, with the remedy, and `Preempted` where a signal ended
    it while it trained or scored.
    """
    began = time.monotonic()
    device = resolve_device(options.device)
    start = find_start(options.start, device)

    def recipe(kind: str, photos: int = 1, iterations: int | None = None) -> DictConfig:
        return recipe_for(
            start,
            kind,
            options.data,
            options.output / kind,
            device=device,
            photos=photos,
            iterations=iterations,
            overrides=options.overrides,
        )

    headline(1, 5, "The data")
    cfg = recipe(options.kinds[0])
    data = check_data(cfg)

    headline(2, 5, "The plan")
    batch = cfg.dataloader.train.total_batch_size
    iterations = options.iterations
    if options.epochs is not None:
        iterations = max(1, round(options.epochs * data.photos / batch))
    configs = {kind: recipe(kind, data.photos, iterations) for kind in options.kinds}
    with sole_run(options.output, "--output FOLDER"):
        cached = options.cache and all(caching_pays(c, data.photos) for c in configs.values())
        _remember(options, start, configs)
        print(*explain(start, configs, data.photos, cached, options), sep="\n")

        headline(3, 5, "Before")
        cfg = next(iter(configs.values()))
        if cached:
            build_features(cfg, data, options.output / "features")
        first = recipe("tuned", data.photos, iterations)
        for cfg in (first, *configs.values()) if cached else ():
            read_features(cfg, options.output / "features")
        evaluate_start(first, options.output / BEFORE)

        for number, (kind, cfg) in enumerate(configs.items(), start=1):
            of = f" ({number} of {len(configs)})" if len(configs) > 1 else ""
            headline(4, 5, f"Tuning{of}, {TITLES[kind]}: {cfg.train.max_iter} iterations")
            tune(cfg)

        headline(5, 5, "What it has brought")
        scores = report(data, options.output, list(configs))
        print(*last_words(data, scores, options.output, list(configs)), sep="\n")
        print(f"Done in {(time.monotonic() - began) / 60:.1f} minutes")
        return scores


# ---- the data -----------------------------------------------------------------------------------


def check_data(cfg: DictConfig) -> Data:
    """Prints what the parts are and what is wrong with them; loads them.

    Raises `ConfigError` where they can't be trained on.
    """
    parts = {
        "train": (cfg.data.train_json, cfg.data.train_images),
        "val": (cfg.data.val_json, cfg.data.val_images),
    }
    loaded: dict[str, Records] = {}
    with input_errors():
        for part, (name, images) in parts.items():
            result = check_dataset(name, images, images=CHECKED)
            print(*result.lines(), sep="\n", flush=True)
            if not result.ok:
                raise ConfigError(_refusal(part, name, images, result))
            [loaded[part], *_] = load_own_data(name, images)
    train, val = loaded["train"], loaded["val"]
    shown = train.with_objects()
    if not shown.any():
        raise ConfigError(
            f"{parts['train'][0]}: none of its {len(train)} images has a box, so there is nothing "
            "to learn: annotate some, five suffice to begin with"
        )
    if not val.with_objects().any():
        raise ConfigError(
            f"{parts['val'][0]}: none of its {len(val)} images has a box, so nothing can be "
            "scored: annotate some more, or name other images, data.val_json=FILE_OR_FOLDER"
        )
    names = get_metadata(parts["val"][0]).thing_classes
    unscored = [n for i, n in enumerate(names) if i not in set(val.classes[~val.crowd].tolist())]
    if unscored:
        print(f"  no box in the validation part, so not scored: {some(unscored, NAMES)}")
    trained = get_metadata(parts["train"][0]).thing_classes
    unseen = [n for i, n in enumerate(trained) if i not in set(train.classes.tolist())]
    if unseen:
        print(f"  no box in the training part, so not learnt: {some(unseen, NAMES)}")
    if len(val) < SURE:
        print(
            f"  {len(val)} validation photos are few: the scores below will be rough (look at "
            f"their intervals); {SURE} or more say something"
        )
    return Data(train.select(np.flatnonzero(shown)), val, parts["val"][0])


def _refusal(part: str, name: str, images: str | None, result: CheckResult) -> str:
    folder = f" --image-folder {images}" if images else ""
    text = (
        f"the {part} part of the data can't be used as it is. What is wrong with it stands above; "
        f"`python -m dynamic_dino.data check {name}{folder} --images all` says it again. Repair it"
    )
    if "missing image" in result.counts:
        text += ", or say where the images are, --images FOLDER"
    if result.counts.keys() & set(BOX_KINDS):
        text += (
            f", or leave bad boxes out: `python -m dynamic_dino.data convert {name} {part}.json"
            f"{folder} --to coco --bad-boxes drop`, and give finetune.py that file"
        )
    return text


# ---- the plan -----------------------------------------------------------------------------------


def explain(
    start: Start,
    configs: dict[str, DictConfig],
    photos: int,
    cached: bool,
    options: Options,
) -> Iterator[str]:
    """What was decided, and why."""
    cfg = next(iter(configs.values()))
    batch, iterations = cfg.dataloader.train.total_batch_size, cfg.train.max_iter
    where = "a GPU is there" if cfg.train.device == "cuda" else "on a CPU"
    yield f"  start       {start.name}" + ("" if options.start else f" ({where}; --start)")
    yield f"  runs        {', '.join(TITLES[kind] for kind in configs)}"
    ruled = iterations == iterations_for(photos, batch)
    why = "30 * sqrt(photos), at least 60; --iterations" if ruled else "asked for"
    yield (
        f"  length      {iterations} iterations of {batch} photos ({why}): each of {photos} photos "
        f"comes {iterations * batch / photos:.3g} times"
    )
    yield f"  rate        {cfg.optimizer.lr:g} (optimizer.lr=)"
    yield (
        "  features    of the frozen backbone are computed once (photos as they are, and mirrored)"
        if cached
        else "  features    are computed in each step"
    )
    yield f"  output      {options.output}"


def _remember(options: Options, start: Start, configs: dict[str, DictConfig]) -> None:
    """Writes plan.json; raises `ConfigError` where the folder has another one, or is in use."""
    cfg = next(iter(configs.values()))
    plan = {
        "data": options.data,
        "start": start.name,
        "weights": start.weights,
        "iterations": cfg.train.max_iter,
        "batch": cfg.dataloader.train.total_batch_size,
        "rate": cfg.optimizer.lr,
        "overrides": list(options.overrides),
    }
    path = options.output / "plan.json"
    if path.is_file():
        if not options.resume:
            raise ConfigError(
                f"{options.output} already holds a fine-tuning: go on with it with --resume, or "
                "choose another folder with --output"
            )
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if other := [key for key in plan if earlier.get(key) != plan[key]]:
            was = ", ".join(f"{key} {earlier.get(key)}, now {plan[key]}" for key in other)
            raise ConfigError(
                f"{path} was made with other settings ({was}): give --resume the same ones, or "
                "choose another folder with --output"
            )
    write_text(path, json.dumps(plan, indent=1) + "\n")


# ---- the runs -----------------------------------------------------------------------------------


def build_features(cfg: DictConfig, data: Data, folder: Path) -> None:
    """Caches the features of all photos; of those to train on also mirrored."""
    with input_errors():
        model = build(cfg.model, "model").to(cfg.train.device).eval()
        load_checkpoint(model, cfg.train.init_checkpoint)
        backbone = module_fingerprint(model.backbone)
        for part, records, flips in (("train", data.train, "store"), ("val", data.val, "mirror")):
            build_feature_cache(
                model.extract_features,
                records,
                folder / part,
                canvas=cfg.model.canvas,
                backbone=backbone,
                flips=flips,
            )


def read_features(cfg: DictConfig, folder: Path) -> None:
    """Makes the loaders read them."""
    cfg.dataloader.train.mapper.features = str(folder / "train")
    cfg.dataloader.test.val.mapper.features = str(folder / "val")


def evaluate_start(cfg: DictConfig, folder: Path) -> None:
    """Scores what tuning starts from, unless that is done."""
    if (folder / "results.json").is_file():
        print(f"done: {folder}")
        return
    cfg.train.output_dir = str(folder)
    with noted_signals(), _logged(cfg):
        do_test(cfg, load_for_evaluation(cfg, resume=False))


def tune(cfg: DictConfig) -> None:
    """Trains and scores, or goes on with it."""
    folder = Path(cfg.train.output_dir)
    with input_errors():
        last = last_checkpoint(folder)
    if last and last.name == "model_final.pth" and (folder / "results.json").is_file():
        print(f"done: {folder}")
        return
    with noted_signals(), _logged(cfg):
        do_train(cfg, resume=last is not None)


@contextmanager
def _logged(cfg: DictConfig) -> Iterator[None]:
    """`setup`, of which the terminal shows progress and warnings; the rest goes to log.txt."""
    before = {name: list(logging.getLogger(name).handlers) for name in LOGGERS}
    for name in LOGGERS:
        setup_logger(str(cfg.train.output_dir), distributed_rank=0, name=name)
        for handler in logging.getLogger(name).handlers:
            if handler not in before[name] and not isinstance(handler, logging.FileHandler):
                handler.addFilter(lambda r: r.levelno >= logging.WARNING or r.name in SAID)
    try:
        setup(cfg)
        yield
    finally:  # the next run logs to its own folder
        for name, handlers in before.items():
            logging.getLogger(name).handlers[:] = handlers


# ---- what it has brought ------------------------------------------------------------------------


def report(data: Data, output: Path, kinds: Sequence[str]) -> dict[str, Scores]:
    """Prints and writes the table; draws the largest changes of the first run."""
    truth = read_ground_truth(ground_truth(data.val_name))
    folders = {BEFORE: output / BEFORE} | {TITLES[kind]: output / kind for kind in kinds}
    scores = {
        title: read_scores(folder / "evaluation/val", truth) for title, folder in folders.items()
    }
    found = gains(truth, scores)
    text = table(truth, scores, found)
    print(text)
    write_text(output / "results.txt", text + "\n")
    content = {
        title: {
            "metrics": run.metrics,
            "threshold": run.threshold,
            "per_class": run.per_class,
            "gains": {metric: asdict(gain) for metric, gain in found.get(title, {}).items()},
        }
        for title, run in scores.items()
    }
    write_text(output / "results.json", json.dumps(content, indent=1) + "\n")
    files = {record["image_id"]: record["file_name"] for record in data.val}
    classes = get_metadata(data.val_name).thing_classes
    names = dict(zip(category_ids_of(data.val_name), classes, strict=True))
    before, after = scores[BEFORE], scores[TITLES[kinds[0]]]
    sheet, gained, lost = changes_sheet(truth, before, after, files, names)
    print(
        f"\nOf {len(truth['images'])} photos {gained} got better and {lost} worse "
        f"({TITLES[kinds[0]]}, by F1, each at its best threshold)"
    )
    if sheet is not None:
        _save(sheet, output / "changes.jpg")
    return scores


def _save(sheet: np.ndarray, path: Path) -> None:
    Image.fromarray(sheet).save(path, quality=90)


def last_words(
    data: Data, scores: dict[str, Scores], output: Path, kinds: Sequence[str]
) -> Iterator[str]:
    """Where things are, and the line that runs the best of the runs."""
    best = max(kinds, key=lambda kind: scores[TITLES[kind]].metrics["AP"])
    yield f"pictures      {output / 'changes.jpg'} (before | after | truth; gains, then losses)"
    yield f"all pictures  {output / best}/evaluation/val/pictures.jpg"
    yield f"table         {output / 'results.txt'}"
    yield f"TensorBoard   tensorboard --logdir {output}"
    if (features := output / "features").is_dir():
        size = sum(file.stat().st_size for file in features.rglob("*.npy"))
        yield f"features      {features}, {size / 1e6:.0f} MB, may be deleted"
    text = " ".join(f"{name}." for name in get_metadata(data.val_name).thing_classes[:6])
    threshold = scores[TITLES[best]].threshold
    yield (
        f"your photos   python projects/DynamicDINO/predict.py PHOTO.jpg --model {output / best} "
        f'--threshold {threshold:.2f} --text "{text}"'
    )
