"""Evaluation of a model on every test set of the recipe."""

from __future__ import annotations

import json
import logging
import math
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from ..evaluation import inference_on_dataset
from .config import ConfigError, accepts, input_errors, nearest
from .trainer import amp_dtype, autocast

logger = logging.getLogger(__name__)


def do_test(cfg: DictConfig, model: nn.Module) -> dict[str, float]:
    """Runs `model` over each ``dataloader.test`` and scores it with the evaluator of that name.

    Details go to ``output_dir/evaluation/<name>/``, all scores to ``output_dir/results.json``.
    Returns {"<name>/<metric>": value} on the main process, {} on the others. Collective.
    """
    loaders, evaluators = cfg.dataloader.get("test") or {}, cfg.dataloader.get("evaluator") or {}
    for name in loaders:
        if name not in evaluators:
            near = nearest(name, evaluators) or list(evaluators)
            raise ConfigError(
                f"dataloader.test.{name} has no evaluator of that name in dataloader.evaluator"
                + (f"; did you mean {' or '.join(near)}?" if near else "")
            )
    device = next(model.parameters()).device.type
    # On CPU bf16 costs precision and, on most machines, wins no time.
    dtype = amp_dtype(cfg.train.amp, device) if cfg.train.amp.enabled and device != "cpu" else None

    scores: dict[str, float] = {}
    for name in loaders:
        folder = Path(cfg.train.output_dir) / "evaluation" / name
        options: dict[str, Any] = dict(evaluators[name])
        if accepts(options, "output_dir") and not options.get("output_dir"):
            options["output_dir"] = str(folder)
        evaluator = instantiate(options)
        with autocast(device, dtype):
            results = inference_on_dataset(model, instantiate(loaders[name]), evaluator)
        for key, value in flatten_results_dict(results).items():
            if isinstance(value, Real):
                scores[f"{name}/{key}"] = float(value)
        comm.synchronize()
    if comm.is_main_process() and scores:
        path = Path(cfg.train.output_dir) / "results.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        finite = {k: v if math.isfinite(v) else None for k, v in scores.items()}
        path.write_text(json.dumps(finite, indent=2) + "\n")
        logger.info("Results, also in %s\n%s", path, results_table(scores))
    return scores


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
    from ..checkpoint import load_checkpoint
    from .checkpointing import last_checkpoint

    path = last_checkpoint(cfg.train.output_dir) if resume else cfg.train.init_checkpoint
    if not path:
        raise ConfigError(
            f"--eval-only --resume found no checkpoint in {cfg.train.output_dir}"
            if resume
            else "--eval-only needs weights: train.init_checkpoint=FILE, or --resume for the last "
            "checkpoint of train.output_dir"
        )
    with input_errors():
        model = instantiate(cfg.model).to(torch.device(cfg.train.device))
        load_checkpoint(model, str(path))
    return model.eval()
