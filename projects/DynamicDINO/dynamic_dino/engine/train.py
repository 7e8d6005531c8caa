"""`do_train`: builds everything from the recipe and runs the loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from detectron2.engine import create_ddp_model, hooks
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from ..checkpoint.weights import load_checkpoint
from ..config import ConfigError, accepts, build, input_errors, require
from ..console import some
from ..data.feature_cache import check_feature_caches
from ..files import DiskFullError
from ..moe.parameters import count_parameters
from .adaptive_experts import AdaptiveExpertsHook
from .checkpointing import (
    BestCheckpointer,
    Checkpointer,
    PeriodicCheckpointer,
    last_checkpoint,
    read_metrics,
    trim_metrics,
)
from .ema import ModelEma
from .evaluate import do_test, results_table, test_sets
from .optim import build_optimizer
from .output import copy_now, copy_soon, holds_a_run, local_folder
from .preemption import EXIT_CODE, Preempted, requested
from .printer import ProgressPrinter
from .setup import sole_run
from .trainable import parameter_table, set_train_mode, set_trainable
from .trainer import Trainer, seed_everything
from .writers import MetricsFile, TensorBoard

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
        if self.trainer.iter < self.trainer.max_iter:
            return
        rows = {}
        for key, value in self.before.items():
            name, _, metric = key.partition("/")
            rows[f"{name}, before/{metric}"] = value
            rows[f"{name}, after/{metric}"] = self.trainer.storage.latest()[key][0]
        if rows:
            logger.info("Before and after training\n%s", results_table(rows))


class Evaluation(hooks.HookBase):
    """Scores the model every `period` iterations (0: never), and after the last one. A resumed run
    begins with the evaluation that was due when it was interrupted.

    Args:
        evaluate: returns the scores on the main process. Collective.
        scored_until: the last iteration of which metrics.json has scores, in all processes.
        before: called on the main process before an evaluation between iterations: it takes long,
            and what it scores should be on the disk by then.
        after: called on the main process when the scores are among the metrics.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[], dict[str, float]],
        scored_until: int = -1,
        before: Sequence[Callable[[], None]] = (),
        after: Sequence[Callable[[], None]] = (),
    ) -> None:
        self.period, self.evaluate, self.scored_until = period, evaluate, scored_until
        self.before, self.after = before, after

    def before_train(self) -> None:
        done = self.trainer.start_iter
        if self._is_due(done) and self.scored_until < done - 1:
            logger.info("The evaluation of iteration %d comes first: it was interrupted", done - 1)
            self.trainer.storage.iter = done - 1
            self._score()

    def after_step(self) -> None:
        if self._is_due(self.trainer.iter + 1):
            for call in self.before:
                call()
            comm.synchronize()  # whoever is asked to end now doesn't take the others along
            self._score()

    def after_train(self) -> None:
        if self.trainer.iter == self.trainer.max_iter:  # it was not interrupted
            self._score()

    def _is_due(self, done: int) -> bool:
        return self.period > 0 < done < self.trainer.max_iter and done % self.period == 0

    def _score(self) -> None:
        scores = self.evaluate()
        if comm.is_main_process():
            self.trainer.storage.put_scalars(**scores, smoothing_hint=False)
            for call in self.after:
                call()
        comm.synchronize()  # it may take longer on one of them


class EndWhenAsked(hooks.HookBase):
    """Ends the run after the iteration in which a signal asked one of its processes to; `before`
    that it is saved. Stands before the evaluation, which comes first when the run is resumed."""

    def __init__(self, before: Sequence[Callable[[], None]] = ()) -> None:
        self.before = before

    def after_step(self) -> None:
        if not self.trainer.preempted:
            return
        for call in self.before:
            call()
        comm.synchronize()  # the launcher ends all of them when the first has ended
        name = requested() or "A signal to another process"
        logger.warning(
            "%s: the run ends after iteration %d, which is saved; go on with --resume (status %d)",
            name,
            self.trainer.iter,
            EXIT_CODE,
        )
        raise Preempted


class MetricsWriter(hooks.PeriodicWriter):
    """Detectron2's hook. An interrupted run writes no row that a whole one doesn't have: what was
    measured since the last one is in the checkpoint. A row that was due comes first. Rows that have
    no room are younger than the last checkpoint, and come when the run is resumed."""

    def before_train(self) -> None:
        if self.trainer.start_iter and self.trainer.start_iter % self._period == 0:
            for writer in self._writers:
                writer.write()

    def after_train(self) -> None:
        if self.trainer.iter == self.trainer.max_iter:
            super().after_train()
        else:
            for writer in self._writers:
                with suppress(DiskFullError):
                    writer.close()


def do_train(cfg: DictConfig, resume: bool = False) -> nn.Module:
    """Trains as the recipe says; with `resume`, goes on from the last checkpoint, if there is one,
    to exactly the numbers of an uninterrupted run. Returns the trained model, without wrappers.

    Raises `Preempted` where a signal that `preemption.noted_signals` heeds ended it,
    `DiskFullError` where a file has no room that a resume needs, or the results of an evaluation,
    `ConfigError` where another run has the output folder.
    """
    require(cfg, "model", "optimizer", "lr_multiplier", "dataloader.train")
    with sole_run(cfg.train.output_dir, new=not resume):
        try:
            return _do_train(cfg, resume)
        except DiskFullError as error:
            last = last_checkpoint(local_folder(cfg.train.output_dir))
            raise DiskFullError(
                f"{error}; the last good checkpoint is {last or 'not there yet'}: make room, and "
                "continue with --resume"
            ) from None


def _do_train(cfg: DictConfig, resume: bool) -> nn.Module:
    train = cfg.train
    output_dir = local_folder(train.output_dir)
    resumable = find_run(train.output_dir, resume)
    check_batch(cfg)
    test_sets(cfg)
    seed_everything(train.seed)
    with input_errors():
        model = build(cfg.model, "model").to(train.device)
        if train.init_checkpoint and not resumable:
            with input_errors("train.init_checkpoint"):
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
        accumulate=train.accumulate,
        log_period=train.log_period,
        last_checkpoint=lambda: last_checkpoint(output_dir),
    )
    checkpointer = Checkpointer(model, output_dir, trainer=trainer, **({"ema": ema} if ema else {}))
    with input_errors():
        start_iter = checkpointer.resume() if resume else 0
    scored_until = _scored_until(cfg)
    if start_iter >= train.max_iter:
        checkpointer.keep_final()
        if not cfg.dataloader.get("test") or scored_until >= start_iter:
            logger.info("This run is complete; evaluate it again with --eval-only --resume")
            return model
        logger.info("What is left of this run is its last evaluation")
        with input_errors():
            registered = _hooks(cfg, trainer, checkpointer, start_iter, scored_until)
        trainer.register_hooks([h for h in registered if not isinstance(h, LRScheduler)])
        trainer.finish(start_iter)
        return model
    with input_errors():
        check_feature_caches([cfg.dataloader.train], model)
        trainer.data_loader = _train_loader(cfg, start_iter)
        _expect(trainer, trainer.data_loader)
        trainer.register_hooks(_hooks(cfg, trainer, checkpointer, start_iter, scored_until))
    trainer.train(start_iter, train.max_iter)
    return model


def find_run(output_dir: str | Path, resume: bool) -> Path | None:
    """The last checkpoint there, if any. Raises `ConfigError` for one that isn't to be resumed."""
    with input_errors():
        resumable = last_checkpoint(local_folder(output_dir))
    if not resume and (resumable or holds_a_run(output_dir)):
        which = f" ({resumable.name})" if resumable else ""
        raise ConfigError(
            f"{output_dir} already holds a run{which}; continue it with --resume, or "
            "choose another folder with train.output_dir=FOLDER"
        )
    return resumable


def _distribute(model: nn.Module, train: DictConfig) -> nn.Module:
    # Detectron2 passes the local rank unless told otherwise: CPU modules allow none, and the only
    # GPU that a process sees is its first.
    ids = {"device_ids": None if train.device == "cpu" else [torch.cuda.current_device()]}
    given = {name: value for name, value in train.ddp.items() if value is not None}
    return create_ddp_model(model, **given, **ids)


def check_batch(cfg: DictConfig) -> None:
    """Before anything is built: that the images of a step can be shared out evenly."""
    total, processes = cfg.dataloader.train.get("total_batch_size"), comm.get_world_size()
    parts = processes * cfg.train.accumulate
    if total is None or total % parts == 0:
        return
    at_once = max(total // parts, 1)  # as many images as fit into a GPU, presumably
    fewer = max(n for n in range(1, processes + 1) if total % n == 0)
    each = total // fewer
    steps = min(n for n in range(1, each + 1) if each % n == 0 and each // n <= at_once)
    multiples = sorted({max(total // parts, 1) * parts, (total // parts + 1) * parts})
    raise ConfigError(
        f"dataloader.train.total_batch_size={total} can't be shared out evenly by {processes} "
        f"processes with train.accumulate={cfg.train.accumulate}: it must be a multiple of {parts} "
        f"({' or '.join(map(str, multiples))}). The same {total} images a step: {fewer} processes "
        f"with train.accumulate={steps}, {each // steps} images at once on each"
    )


def _train_loader(cfg: DictConfig, start_iter: int):
    """The loader, told where to start, so that a resumed run sees the data in the same order."""
    node = cfg.dataloader.train
    if "start_iter" in node or accepts(node, "start_iter"):
        return build({**node, "start_iter": start_iter}, "dataloader.train")
    if start_iter > 0:
        logger.warning(
            "dataloader.train takes no start_iter: the data starts again from its beginning"
        )
    return build(node, "dataloader.train")


def _expect(trainer: Trainer, loader) -> None:
    """Tells the trainer of its records, how many may be bad, and warns where a resumed run had
    another number of them: the order of the samples depends on it."""
    data = getattr(loader, "dataset", None)
    if records := getattr(data, "records", None):
        if trainer.num_records not in (None, len(records)):
            logger.warning(
                "The training data had %d records when this run was interrupted, and has %d: from "
                "here on they come in another order",
                trainer.num_records,
                len(records),
            )
        trainer.num_records, trainer.most_bad = len(records), data.most_bad


def _scored_until(cfg: DictConfig) -> int:
    """The last iteration of which metrics.json has scores, -1 if of none. Collective."""
    names = tuple(f"{name}/" for name in cfg.dataloader.get("test") or ())
    last = -1
    if comm.is_main_process():
        rows = read_metrics(local_folder(cfg.train.output_dir) / "metrics.json")
        scored = (row["iteration"] for row in rows if any(key.startswith(names) for key in row))
        last = max(scored, default=-1)
    return comm.all_gather(last)[0]


def _hooks(
    cfg: DictConfig,
    trainer: Trainer,
    checkpointer: Checkpointer,
    start_iter: int,
    scored_until: int,
) -> list[hooks.HookBase]:
    train, folder = cfg.train, local_folder(cfg.train.output_dir)

    def evaluate() -> dict[str, float]:
        model = trainer.ema.model if trainer.ema else trainer.module
        saved = last_checkpoint(folder)
        iteration = min(trainer.storage.iter, train.max_iter - 1) if saved else None
        scores = do_test(cfg, model, weights=saved and saved.name, iteration=iteration)
        set_train_mode(trainer.model)
        return {key: value for key, value in scores.items() if value == value}  # no NaN in logs

    has_tests = bool(cfg.dataloader.get("test"))
    if has_tests and train.best_metric:
        sets = [*cfg.dataloader.test, *(cfg.dataloader.get("means") or {})]
        if not train.best_metric.startswith(tuple(f"{name}/" for name in sets)):
            raise ConfigError(
                f"train.best_metric={train.best_metric!r} is of no test set: give {sets[0]}/AP, "
                f"say (there are {some(sets)}), or null"
            )
    common = [
        hooks.IterationTimer(),
        LRScheduler(scheduler=build(cfg.lr_multiplier, "lr_multiplier")),
    ]
    if (adaptive := train.adaptive_experts).enabled:
        with input_errors("train.adaptive_experts.enabled"):
            common.append(AdaptiveExpertsHook(trainer.module, adaptive.period, adaptive.window))
    first = [EvaluateFirst(evaluate)] if has_tests and train.eval_first else []
    if not comm.is_main_process():
        evaluation = [Evaluation(train.eval_period, evaluate, scored_until)] if has_tests else []
        return [*common, EndWhenAsked(), *evaluation, *first]

    # Saved before it is evaluated: a crash of the evaluation costs no training.
    saving = PeriodicCheckpointer(
        checkpointer,
        train.checkpointer.period,
        max_to_keep=train.checkpointer.max_to_keep,
        after=partial(copy_soon, train.output_dir),
    )
    metrics = folder / "metrics.json"
    kept = trim_metrics(metrics, start_iter)
    trainer.logged_until = max((row["iteration"] for row in kept), default=-1)
    # A row is the median of the iterations since the last one; with log_period=1, exact.
    rows = MetricsFile(metrics, train.log_period)
    checkpointer.before_saving = rows.settle  # a run that resumes from there won't write them
    files = [TensorBoard(folder, train.log_period, purge_step=start_iter), rows]
    writing = MetricsWriter([ProgressPrinter(train.max_iter), *files], period=train.log_period)
    ending = EndWhenAsked([saving.save_now, partial(copy_now, train.output_dir)])
    hooks_of_main = [*common, saving, ending]
    if has_tests:
        # On disk as soon as they are there: the evaluation isn't done again.
        after = [file.write for file in files]
        if train.best_metric:
            best = BestCheckpointer(checkpointer, train.best_metric)
            hooks_of_main.append(best)
            after.insert(0, best.keep_if_best)
        after.append(partial(copy_soon, train.output_dir))
        hooks_of_main.append(
            Evaluation(train.eval_period, evaluate, scored_until, [saving.save_now], after)
        )
    return [*hooks_of_main, *first, writing]
