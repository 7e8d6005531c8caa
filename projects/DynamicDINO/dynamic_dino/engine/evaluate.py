"""Evaluation of a model on every test set of the recipe."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from ..checkpoint.weights import load_checkpoint
from ..config import ConfigError, accepts, build, input_errors, nearest
from ..data.builtin import BUILTIN
from ..data.catalog import require_file
from ..data.feature_cache import check_feature_caches, module_fingerprint
from ..data.ground_truth import annotation_files
from ..data.loader import as_sources
from ..data.once import read_once
from ..data.records import Mixture
from ..evaluation import DetectionEvaluator, PredictionLog
from ..files import DiskFullError, write_text
from .checkpointing import last_checkpoint, read_checkpoint
from .fingerprint import fingerprint, hash_of_config
from .output import local_folder
from .preemption import Stoppable
from .trainer import amp_dtype, autocast

logger = logging.getLogger(__name__)


def do_test(
    cfg: DictConfig,
    model: nn.Module,
    *,
    weights: str | None = None,
    iteration: int | None = None,
) -> dict[str, float]:
    """Runs `model` over each ``dataloader.test`` and scores it with the evaluator of that name.

    Details go to ``output_dir/evaluation/<name>/``, all scores to ``output_dir/results.json``, both
    with the ``weights`` that have them (by default ``train.init_checkpoint``), and their iteration.
    Returns {"<name>/<metric>": value} on the main process, {} on the others. Collective.

    What is found is also written down as it comes (`PredictionLog`): an evaluation that was
    interrupted goes on where it stopped, if weights, recipe, data and code are the same.

    With ``dataloader.skip_missing``, test sets whose annotations don't exist are left out and
    named. ``dataloader.means``, title -> names of test sets, adds the mean over them of each metric
    that all have; where some are missing, its title says over how many of them it is.

    Raises `Preempted` after a batch if a signal asked the process to end.
    """
    loaders = cfg.dataloader.get("test") or {}
    source = {"weights": weights or cfg.train.init_checkpoint or None, "iteration": iteration}
    names = test_sets(cfg)
    with input_errors():
        check_feature_caches([loaders[name] for name in names], model)
    device = next(model.parameters()).device.type
    # On CPU bf16 costs precision and, on most machines, wins no time.
    dtype = amp_dtype(cfg.train.amp, device) if device != "cpu" else None

    # of many test sets once, of each evaluation in training anew
    weights = cache(lambda: module_fingerprint(model) if comm.is_main_process() else "")
    scores: dict[str, float] = {}
    logs: list[PredictionLog] = []
    for name in names:
        evaluator, log = _evaluator(cfg, name, model, weights, dtype, source)
        loader = Stoppable(
            _load_all_but(log.done if log else (), loaders[name], f"dataloader.test.{name}")
        )
        with autocast(device, dtype), adjusted(model, getattr(evaluator, "detector", {})):
            results = inference_on_dataset(model, loader, evaluator)
        for key, value in flatten_results_dict(results).items():
            if isinstance(value, Real):
                scores[f"{name}/{key}"] = float(value)
        logs += [log] if log else []
        comm.synchronize()
    if comm.is_main_process() and scores:
        scores |= means(scores, cfg.dataloader.get("means") or {})
        path = local_folder(cfg.train.output_dir) / "results.json"
        finite = {k: v if math.isfinite(v) else None for k, v in scores.items()}
        write_text(path, json.dumps(source | finite, indent=2) + "\n")
        logger.info("Results, also in %s\n%s", path, results_table(scores))
    for log in logs:  # only now: who starts again after the first of 35 sets finds it done
        log.remove()
    return scores


def _evaluator(
    cfg: DictConfig,
    name: str,
    model: nn.Module,
    weights: Callable[[], str],
    dtype: torch.dtype | None,
    source: Mapping[str, Any],
) -> tuple[DatasetEvaluator, PredictionLog | None]:
    """The evaluator of a test set; one of ours keeps a log in the set's output folder."""
    folder = local_folder(cfg.train.output_dir) / "evaluation" / name
    node = cfg.dataloader.evaluator[name]
    options: dict[str, Any] = dict(node)
    if accepts(options, "output_dir") and not options.get("output_dir"):
        options["output_dir"] = str(folder)
    evaluator = build(options, f"dataloader.evaluator.{name}")
    if not isinstance(evaluator, DetectionEvaluator):
        return evaluator, None
    evidence = fingerprint(model, weights(), cfg.dataloader.test[name], node, cfg.model, dtype)
    log = PredictionLog(folder / "unfinished", evidence)
    evaluator.use_log(log)
    evaluator.source = source
    return evaluator, log


@contextmanager
def adjusted(model: nn.Module, settings: Mapping[str, Any]) -> Iterator[None]:
    """The model with other settings for a while, such as ``max_detections``.

    They are attributes of the model, changed and put back: a protocol decides them (LVIS asks 40
    names at a time), and a second model with the same weights would cost their memory again.
    """
    unknown = [key for key in settings if not hasattr(model, key)]
    if unknown:
        raise ConfigError(
            f"the evaluator's detector.{unknown[0]}: {type(model).__name__} has no such setting"
        )
    before = {key: getattr(model, key) for key in settings}
    try:
        for key, value in settings.items():
            setattr(model, key, value)
        yield
    finally:
        for key, value in before.items():
            setattr(model, key, value)


def means(scores: Mapping[str, float], groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """{"<title>/<metric>": mean over the test sets of the group}, of the metrics that all have.

    Of a group of which some sets have no scores, the title becomes "<title> (7 of 13 sets)".
    """
    by_name: dict[str, dict[str, float]] = {}
    for key, value in scores.items():
        name, _, metric = key.partition("/")
        by_name.setdefault(name, {})[metric] = value
    result = {}
    for title, names in groups.items():
        rows = [by_name[name] for name in names if name in by_name]
        if not rows:
            continue
        if len(rows) < len(names):
            title = f"{title} ({len(rows)} of {len(names)} sets)"
        for metric in rows[0]:
            values = [row.get(metric, -1.0) for row in rows]
            if "/" not in metric and min(values) >= 0:  # -1: no ground truth to score
                result[f"{title}/{metric}"] = sum(values) / len(values)
    return result


def test_sets(cfg: DictConfig) -> list[str]:
    """The names of the test sets that can be evaluated: all, but for those without annotations
    where ``dataloader.skip_missing`` is set. Raises `ConfigError`; training asks before it begins.
    """
    loaders, evaluators = cfg.dataloader.get("test") or {}, cfg.dataloader.get("evaluator") or {}
    missing: dict[str, Path] = {}
    for name in loaders:
        if name not in evaluators:
            near = nearest(name, evaluators) or list(evaluators)
            raise ConfigError(
                f"dataloader.test.{name} has no evaluator of that name in dataloader.evaluator"
                + (f"; did you mean {' or '.join(near)}?" if near else "")
            )
        dataset = evaluators[name].get("dataset_name")
        with input_errors(f"dataloader.evaluator.{name}.dataset_name"):
            files = annotation_files(dataset) if dataset else []
            absent = [file for file in files if not file.is_file()]
            if absent and cfg.dataloader.get("skip_missing"):
                missing[name] = absent[0]
            elif absent:
                require_file(absent[0], BUILTIN[dataset].remedy if dataset in BUILTIN else "")
    if missing:
        lines = "\n".join(f"  {name}: {file}" for name, file in missing.items())
        text = f"{len(missing)} of {len(loaders)} test sets are missing:\n{lines}"
        if len(missing) == len(loaders):
            raise ConfigError(f"{text}\nset DETECTRON2_DATASETS to the folder that has them")
        logger.warning("%s\nThe others are evaluated.", text)
    return [name for name in loaders if name not in missing]


def _load_all_but(done: Collection, loader: Mapping, key: str) -> Iterable[list[dict]]:
    """The loader, without the images of these ids: they aren't even read. Annotations are read once
    in a run, however often it is evaluated."""
    dataset = loader.get("dataset")
    if not isinstance(dataset, Mapping):
        return build(loader, key)
    records = _records(dataset, f"{key}.dataset")
    if not done:
        return build({**loader, "dataset": records}, key)
    records = Mixture(as_sources(records))
    left = [record for record in records if record["image_id"] not in done]
    logger.info("%d of %d images were evaluated before", len(records) - len(left), len(records))
    return build({**loader, "dataset": left}, key) if left else []


def _records(dataset: Mapping, key: str) -> Any:
    """A loader's `dataset`. What `load_datasets` reads of a name or path is kept."""
    if not isinstance(dataset.get("names"), str):
        return build(dataset, key)
    files = annotation_files(dataset["names"])
    return read_once(("records", hash_of_config(dataset)), files, lambda: build(dataset, key))


def results_table(scores: dict[str, float]) -> str:
    """One row per test set, one column per metric that any of them has."""
    rows: dict[str, dict[str, float]] = {}
    for key, value in scores.items():
        name, _, metric = key.partition("/")
        rows.setdefault(name, {})[metric] = value
    metrics = list(dict.fromkeys(m for row in rows.values() for m in row if "/" not in m))
    width = max(map(len, rows))
    head = f"{'':<{width}} " + " ".join(f"{m:>9}" for m in metrics)

    def cell(value: float | None) -> str:  # -1: no ground truth to score
        return f"{'-':>9}" if value in (None, -1) else f"{value:9.2f}"

    lines = [
        f"{name:<{width}} " + " ".join(cell(row.get(m)) for m in metrics)
        for name, row in rows.items()
    ]
    return "\n".join([head, *lines])


def load_for_evaluation(cfg: DictConfig, resume: bool) -> nn.Module:
    """The recipe's model with the run's last weights (`resume`) or ``train.init_checkpoint``."""
    with input_errors():
        folder = local_folder(cfg.train.output_dir)
        path = last_checkpoint(folder) if resume else cfg.train.init_checkpoint
    if not path:
        raise ConfigError(
            f"--eval-only --resume found no checkpoint in {cfg.train.output_dir} (an interrupted "
            "evaluation goes on without --resume)"
            if resume
            else "--eval-only needs weights: train.init_checkpoint=FILE, or --resume for the last "
            "checkpoint of train.output_dir"
        )
    with input_errors():
        model = build(cfg.model, "model").to(torch.device(cfg.train.device))
        load_checkpoint(model, str(path))
    return model.eval()


def evaluate_weights(cfg: DictConfig, resume: bool) -> dict[str, float]:
    """`do_test` of what `load_for_evaluation` loads. Raises `DiskFullError`."""
    model = load_for_evaluation(cfg, resume)
    of: dict[str, Any] = {}
    if resume:
        path = last_checkpoint(local_folder(cfg.train.output_dir))
        of = {"weights": path.name, "iteration": read_checkpoint(path, mmap=True).get("iteration")}
    try:
        return do_test(cfg, model, **of)
    except DiskFullError as error:
        raise DiskFullError(
            f"{error}; make room, and start the same command again: it goes on where it stopped"
        ) from None
