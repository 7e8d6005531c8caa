"""`do_train`: builds everything from the recipe and runs the loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from detectron2.config import instantiate
from detectron2.engine import create_ddp_model, hooks
from detectron2.utils import comm
from detectron2.utils.events import JSONWriter, TensorboardXWriter
from omegaconf import DictConfig
from torch import nn

from ..checkpoint.weights import load_checkpoint
from ..config import ConfigError, accepts, input_errors, require
from ..data.feature_cache import check_feature_caches
from ..moe.parameters import count_parameters
from .adaptive_experts import AdaptiveExpertsHook
from .checkpointing import (
    BestCheckpointer,
    Checkpointer,
    PeriodicCheckpointer,
    last_checkpoint,
    trim_metrics,
)
from .ema import ModelEma
from .evaluate import do_test, results_table
from .optim import build_optimizer
from .printer import ProgressPrinter
from .trainable import parameter_table, set_train_mode, set_trainable
from .trainer import Trainer, seed_everything

logger = logging.getLogger(__name__)


class LRScheduler(hooks.LRScheduler):
    """Detectron2's hook. It takes no step after the last iteration, which not every schedule of
    fvcore is defined for, and saves nothing: the rate follows from the iteration."""

    def after_step(self) -> None:
        if self.trainer.iter + 1 < self.trainer.max_iter:
            super().after_step()
        else:
            lr = self._optimizer.param_groups[self._best_param_group_id]["lr"]
            self.trainer.storage.put_scalar("lr", lr, smoothing_hint=False)

    def state_dict(self) -> dict:
        return {}


class EvaluateFirst(hooks.HookBase):
    """Scores the model that training starts from, and compares it with the trained one at the end.
    A resumed run has only the latter."""

    def __init__(self, evaluate: Callable[[], dict[str, float]]) -> None:
        self.evaluate = evaluate
        self.before: dict[str, float] = {}

    def before_train(self) -> None:
        if self.trainer.iter == 0:
            self.before = self.evaluate()
            self.trainer.storage.put_scalars(**self.before, smoothing_hint=False)

    def after_train(self) -> None:
        rows = {}
        for key, value in self.before.items():
            name, _, metric = key.partition("/")
            rows[f"{name}, before/{metric}"] = value
            rows[f"{name}, after/{metric}"] = self.trainer.storage.latest()[key][0]
        if rows:
            logger.info("Before and after training\n%s", results_table(rows))


def do_train(cfg: DictConfig, resume: bool = False) -> nn.Module:
    """Trains as the recipe says; with `resume`, goes on from the last checkpoint, if there is one,
    to exactly the numbers of an uninterrupted run. Returns the trained model, without wrappers.
    """
    require(cfg, "model", "optimizer", "lr_multiplier", "dataloader.train")
    train = cfg.train
    output_dir = Path(train.output_dir)
    resumable = last_checkpoint(output_dir)
    if resumable and not resume:
        raise ConfigError(
            f"{output_dir} already holds a run ({resumable.name}); continue it with --resume, or "
            "choose another folder with train.output_dir=FOLDER"
        )

    output_dir.mkdir(parents=True, exist_ok=True)
    seed_everything(train.seed)
    with input_errors():
        model = instantiate(cfg.model).to(train.device)
        if train.init_checkpoint and not resumable:
            load_checkpoint(model, train.init_checkpoint, train.init_except)
        set_trainable(model, train.trainable)
        optimizer = build_optimizer(cfg.optimizer, model)
    logger.info(parameter_table(count_parameters(model)))

    wrapped = _distribute(model, train)
    ema = ModelEma(model, train.ema.decay) if train.ema.enabled else None
    trainer = Trainer(
        wrapped,
        None,  # the loader needs to know the iteration to start with
        optimizer,
        seed=train.seed,
        amp=train.amp,
        clip_grad=train.clip_grad,
        ema=ema,
        log_period=train.log_period,
        last_checkpoint=lambda: last_checkpoint(output_dir),
    )
    checkpointer = Checkpointer(model, output_dir, trainer=trainer, **({"ema": ema} if ema else {}))
    start_iter = checkpointer.resume() if resume else 0
    if start_iter >= train.max_iter:
        logger.info("This run is complete; evaluate it again with --eval-only --resume")
        return model
    with input_errors():
        check_feature_caches([cfg.dataloader.train], model)
        trainer.data_loader = _train_loader(cfg, start_iter)
        trainer.register_hooks(_hooks(cfg, trainer, checkpointer, start_iter))
    trainer.train(start_iter, train.max_iter)
    return model


def _distribute(model: nn.Module, train: DictConfig) -> nn.Module:
    # Detectron2 passes device_ids unless told otherwise, which CPU modules don't allow.
    ids = {"device_ids": None} if train.device == "cpu" else {}
    return create_ddp_model(model, **train.ddp, **ids)


def _train_loader(cfg: DictConfig, start_iter: int):
    """The loader, told where to start, so that a resumed run sees the data in the same order."""
    node = cfg.dataloader.train
    if "start_iter" in node or accepts(node, "start_iter"):
        return instantiate({**node, "start_iter": start_iter})
    if start_iter > 0:
        logger.warning(
            "dataloader.train takes no start_iter: the data starts again from its beginning"
        )
    return instantiate(node)


def _hooks(
    cfg: DictConfig, trainer: Trainer, checkpointer: Checkpointer, start_iter: int
) -> list[hooks.HookBase]:
    train = cfg.train

    def evaluate() -> dict[str, float]:
        scores = do_test(cfg, trainer.ema.model if trainer.ema else trainer.module)
        set_train_mode(trainer.model)
        return {key: value for key, value in scores.items() if value == value}  # no NaN in logs

    has_tests = bool(cfg.dataloader.get("test"))
    common = [
        hooks.IterationTimer(),
        LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
    ]
    if (adaptive := train.adaptive_experts).enabled:
        common.append(AdaptiveExpertsHook(trainer.module, adaptive.period, adaptive.window))
    evaluation = [hooks.EvalHook(train.eval_period, evaluate)] if has_tests else []
    if has_tests and train.eval_first:
        evaluation.append(EvaluateFirst(evaluate))
    if not comm.is_main_process():
        return [*common, *evaluation]

    # Saved before it is evaluated: a crash of the evaluation costs no training.
    saving = PeriodicCheckpointer(
        checkpointer, train.checkpointer.period, max_to_keep=train.checkpointer.max_to_keep
    )
    best = [BestCheckpointer(checkpointer, train.best_metric, train.eval_period)]
    metrics = Path(train.output_dir) / "metrics.json"
    trim_metrics(metrics, start_iter)
    writers = [
        ProgressPrinter(train.max_iter),
        # A row is the median of the iterations since the last one; with log_period=1, exact.
        JSONWriter(str(metrics), window_size=train.log_period),
        TensorboardXWriter(train.output_dir, window_size=train.log_period, purge_step=start_iter),
    ]
    return [
        *common,
        saving,
        *evaluation,
        *(best if evaluation and train.best_metric else []),
        hooks.PeriodicWriter(writers, period=train.log_period),
    ]
