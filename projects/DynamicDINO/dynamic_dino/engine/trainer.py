"""`Trainer`: one iteration, made so that an interrupted run continues to the same numbers."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..config import ConfigError
from ..console import some
from ..data.workers import WorkerEndedError, loading_errors
from ..files import DiskFullError
from ..moe.routing import Routing
from .ema import ModelEma
from .preemption import requested
from .trainable import set_train_mode

logger = logging.getLogger(__name__)

TIMES = ("time", "data_time")  # of the machine, not of the run
AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class NonFiniteLossError(FloatingPointError):
    """A loss or the gradients became infinite or NaN; the weights were not touched by them."""


# The command says these in one line; Detectron2's loop would log their traceback before.
_SAID_ELSEWHERE = (NonFiniteLossError, DiskFullError, ConfigError, WorkerEndedError)
logging.getLogger("detectron2.engine.train_loop").addFilter(
    lambda record: not (record.exc_info and isinstance(record.exc_info[1], _SAID_ELSEWHERE))
)


class Trainer(SimpleTrainer):
    """Detectron2's trainer, with autocast, clipping, EMA, exact resume and a stop at NaN.

    The model returns a dict of scalars: what is called ``loss*`` is summed and differentiated, the
    rest is only logged. "routings", if it has any, are for hooks (`self.routings`). All randomness
    of an iteration follows from (seed, iteration, rank), so a checkpoint needs no generator states.

    The processes have the same weights and buffers after every iteration: running statistics of
    trained BatchNorm are their mean, so that what is saved by one is what all of them score.
    `preempted` says after each whether a signal asked any of them to end.

    With `accumulate` = N, a process cuts its batch into N micro-batches, which go through the model
    one after the other; gradients, losses and running statistics are their means, and one step is
    taken. Micro-batches are to the others what processes are: W processes compute what W * N would
    without accumulation, noise and dropout included, but for rounding. It is also what one large
    batch gives, if what the model returns is a mean over samples. The detector's losses are means
    over objects, of all micro-batches together: a model with a method ``mean_objects(batches)`` is
    called with its result as ``objects``. What differs from one large batch is what a process has
    of its own: normalisation by BatchNorm, noise, and router losses, see `RouterLoss`.

    Args:
        loader: infinite iterable of batches, each a list of samples with a "file_name".
        amp: ``enabled`` and ``dtype``.   clip_grad: ``enabled``, ``max_norm``, ``norm_type``.
        accumulate: micro-batches of an iteration, which must divide the batch of a process.
        log_period: with several processes, metrics are averaged over them this often; those of the
            last `log_period` iterations are in a checkpoint.
        last_checkpoint: names what is safe on disk, for the message when the run must stop.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int = 0,
        amp: Mapping | None = None,
        clip_grad: Mapping | None = None,
        ema: ModelEma | None = None,
        accumulate: int = 1,
        log_period: int = 20,
        last_checkpoint: Callable[[], Any] = lambda: None,
    ) -> None:
        period = 1 if comm.get_world_size() == 1 else log_period
        super().__init__(model, loader, optimizer, gather_metric_period=period)
        set_train_mode(model)
        self.seed, self.ema, self.last_checkpoint = seed, ema, last_checkpoint
        self.accumulate, self.log_period = accumulate, log_period
        self.preempted = False
        self.logged_until = -1  # the iteration of the last row in the metrics' file
        self._recent: dict[str, dict] = {}  # metrics of the run that is resumed
        self.bad_records: dict[int, str] = {}  # met so far by any process, and what is wrong
        self.most_bad, self.num_records = 0, None  # of the training data
        self.routings: list[Routing] = []  # of this iteration's MoE layers
        self._has_learnt = False  # a micro-batch has gone through the model
        self.clip_grad = clip_grad or {"enabled": False}
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._statistics = running_statistics(model)
        device = self.parameters[0].device.type
        self.amp_dtype = amp_dtype(amp, device)
        self.scaler = torch.amp.GradScaler(device, enabled=self.amp_dtype is torch.float16)

    @property
    def module(self) -> nn.Module:
        """The model without the wrapper of distributed training."""
        wrapped = isinstance(self.model, DistributedDataParallel)
        return self.model.module if wrapped else self.model

    def run_step(self) -> None:
        start = time.perf_counter()
        seed_everything(self.seed, self.iter, comm.get_rank())
        with loading_errors(self._after_a_bad_record):
            batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        bad = {i: why for s in batch for i, why in s.pop("bad_records", {}).items()}
        bad = {i: why for i, why in bad.items() if i not in self.bad_records}

        self.optimizer.zero_grad(set_to_none=True)
        outputs, values = self._backward(batch)
        losses = [name for name in outputs if name.startswith("loss")]
        self.after_backward()
        preempted, met_bad = self._agree(bool(requested()), bool(bad))
        self.scaler.unscale_(self.optimizer)
        grad_norm = self._clip_gradients()

        # One transfer for all scalars, the iteration's only wait for the device.
        names = [*outputs, "grad_norm", "preempted", "bad_records"]
        more = [x.float().to(values.device) for x in (grad_norm, preempted, met_bad)]
        metrics = dict(zip(names, torch.cat([values, torch.stack(more)]).tolist(), strict=True))
        self.preempted = metrics.pop("preempted") > 0
        if metrics.pop("bad_records") > 0:
            self._report(bad)
        if self.bad_records:
            metrics["bad_records"] = len(self.bad_records)
        self._stop_if_not_finite(batch, metrics, losses)

        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update()
        metrics["total_loss"] = sum(metrics[name] for name in losses)
        self._log(metrics, data_time)

    def _backward(self, batch: list[dict]) -> tuple[list[str], Tensor]:
        """Leaves the gradients of the batch; names and means of what the model returned."""
        parts = micro_batches(batch, self.accumulate)
        first = comm.get_rank() * len(parts)
        shared = {}
        if len(parts) > 1 and hasattr(self.module, "mean_objects"):
            shared["objects"] = self.module.mean_objects(parts)
        before = [buffer.clone() for buffer in self._statistics] if len(parts) > 1 else []
        outputs, statistics, routings = [], [], []
        self.routings = []  # the last iteration's hold memory
        for i, part in enumerate(parts):
            # Once more after the batch was fetched: starting its workers, a DataLoader draws from
            # the generator, in the first iteration after a resume too.
            seed_everything(self.seed, self.iter, first + i, 1)
            if before:
                torch._foreach_copy_(self._statistics, before)
            with nullcontext() if i + 1 == len(parts) else self._gradients_stay_here():
                found = self._forward(part, shared)
                routings.append(found.pop("routings", []))
                losses = [value for name, value in found.items() if name.startswith("loss")]
                if not losses:
                    raise ValueError(
                        f"the model returned no 'loss*' in training, only {list(found)}"
                    )
                self.scaler.scale(sum(losses) / len(parts)).backward()
            outputs.append(found)
            statistics.append([buffer.clone() for buffer in self._statistics] if before else [])
        for buffer, *values in zip(self._statistics, *statistics, strict=True) if before else ():
            buffer.copy_(torch.stack(values).mean(0))
        self.routings = routings[0]
        if len(parts) > 1:
            with torch.no_grad():
                self.routings = [Routing.cat(layer) for layer in zip(*routings, strict=True)]
        device = self.parameters[0].device
        rows = [
            torch.stack([torch.as_tensor(row[n]).detach().float().to(device) for n in outputs[0]])
            for row in outputs
        ]
        return list(outputs[0]), torch.stack(rows).mean(0)

    def _forward(self, batch: list[dict], shared: dict[str, Tensor]) -> dict[str, Any]:
        try:
            with autocast(self.parameters[0].device.type, self.amp_dtype):
                return self.model(batch, **shared)
        except FloatingPointError as error:  # the matcher meets NaN before the loss does
            raise self._not_finite(f"the model's output ({error})", [_file_names(batch)]) from error
        except Exception:
            logger.error("Iteration %d failed on %s", self.iter, _file_names(batch))
            raise

    def _gradients_stay_here(self):
        """Other processes get them with those of the last micro-batch. In the first of all, DDP is
        left to learn what a static graph is; that it averages twice changes nothing."""
        wrapped, first = isinstance(self.model, DistributedDataParallel), not self._has_learnt
        self._has_learnt = True
        stay = wrapped and not (first and self.model.static_graph)
        return self.model.no_sync() if stay else nullcontext()

    def before_train(self) -> None:
        """What was measured last before an interruption counts in the next row of metrics, and is
        written where its own row wasn't any more."""
        for name, recent in self._recent.items():
            for value, iteration in recent["values"]:
                if iteration > self.logged_until:
                    self.storage.put_scalar(name, value, recent["smooth"], cur_iter=iteration)
                else:
                    self.storage.histories()[name].update(value, iteration)
        super().before_train()

    def finish(self, max_iter: int) -> None:
        """What comes after the last iteration, of a run that was interrupted there."""
        self.iter = self.start_iter = self.max_iter = max_iter
        with EventStorage(max_iter) as self.storage:
            self.before_train()
            self.after_train()

    def state_dict(self) -> dict:
        state = {**super().state_dict(), "scaler": self.scaler.state_dict()}
        data = {"bad_records": dict(self.bad_records), "num_records": self.num_records}
        return {**state, **data, "recent": self._recent_metrics()}

    def _recent_metrics(self) -> dict[str, dict]:
        """name -> {"values": [[value, iteration], ...], "smooth": whether it is}."""
        hints, first = self.storage.smoothing_hints(), self.iter - self.log_period
        recent = {
            name: [[value, i] for value, i in history.values()[-self.log_period :] if i > first]
            for name, history in self.storage.histories().items()
            if name not in TIMES and name in hints
        }
        return {n: {"values": values, "smooth": hints[n]} for n, values in recent.items() if values}

    def load_state_dict(self, state_dict: dict) -> None:
        """Rates, decays etc. stay as the recipe has them, so that overrides count on resume."""
        options = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        # Before it is loaded: a fused optimizer has its counters on the GPU, another on the CPU.
        saved = state_dict["optimizer"]
        groups = [
            {**group, "fused": own.get("fused")} if "fused" in own else group
            for group, own in zip(saved["param_groups"], options, strict=False)  # PyTorch checks
        ]
        super().load_state_dict({**state_dict, "optimizer": {**saved, "param_groups": groups}})
        self._recent = state_dict.get("recent", {})
        self.bad_records = state_dict.get("bad_records", {})
        self.num_records = state_dict.get("num_records")
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own, initial_lr=own["lr"])
        if state_dict["scaler"]:
            self.scaler.load_state_dict(state_dict["scaler"])

    def _agree(self, *happened: bool) -> Tensor:
        """Averages the running statistics over the processes. float [len(happened)], above 0 in all
        of them where it happened in one."""
        # Filled on the device: a copy from the host would wait for all that was sent there before.
        device = self.parameters[0].device
        flags = torch.stack([torch.full((), float(one), device=device) for one in happened])
        if comm.get_world_size() > 1:
            shared = torch.cat([flags, *(buffer.flatten().float() for buffer in self._statistics)])
            dist.all_reduce(shared)
            shared /= comm.get_world_size()
            sizes = [len(flags), *(buffer.numel() for buffer in self._statistics)]
            flags, *means = shared.split(sizes)
            for buffer, mean in zip(self._statistics, means, strict=True):
                buffer.copy_(mean.view_as(buffer))
        return flags

    def _report(self, bad: dict[int, str]) -> None:
        """Collective; `bad`: what this process met. Raises ConfigError where it is too much."""
        for part in comm.all_gather(bad):
            for index, why in part.items():
                if index not in self.bad_records:
                    self.bad_records[index] = why
                    logger.warning("Left out, another record takes its place: %s", why)
        if len(self.bad_records) > self.most_bad:
            raise ConfigError(
                f"{len(self.bad_records)} bad records, more than dataloader.train.max_bad allows "
                f"of {self.num_records:,}: {some(list(self.bad_records.values()))}; mend them, or "
                f"allow more, and go on with --resume (last checkpoint: {self.last_checkpoint()})"
            )

    def _after_a_bad_record(self) -> str:
        return (
            "mend what is wrong, and go on with --resume (last checkpoint: "
            f"{self.last_checkpoint()}); dataloader.train.max_bad lets others take the place of "
            "some bad records"
        )

    def _clip_gradients(self) -> Tensor:
        """Returns the norm of all gradients before clipping."""
        norm_type = float(self.clip_grad.get("norm_type", 2.0))
        if self.clip_grad["enabled"]:
            max_norm = self.clip_grad["max_norm"]
            return nn.utils.clip_grad_norm_(self.parameters, max_norm, norm_type)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return nn.utils.get_total_norm(gradients, norm_type)

    def _stop_if_not_finite(self, batch: list, metrics: dict[str, float], losses: list) -> None:
        bad_loss = not all(math.isfinite(metrics[name]) for name in losses)
        # With loss scaling, infinite gradients are ordinary: the scaler skips the step.
        bad_norm = not math.isfinite(metrics["grad_norm"]) and not self.scaler.is_enabled()
        if not (bad_loss or bad_norm):
            return
        culprits = [(_file_names(batch), metrics if bad_loss else None)]
        if bad_norm:  # gradients are averaged, so all processes come here: find whose loss it was
            everyone = comm.all_gather((_file_names(batch), metrics if bad_loss else None))
            culprits = [c for c in everyone if c[1] is not None]
            culprits = culprits or [(files, metrics) for files, _ in everyone]
        reports = [
            f"{files}\n  terms: " + ", ".join(f"{k}={v:.4g}" for k, v in terms.items())
            for files, terms in culprits
        ]
        what = "the loss" if any(_bad(terms, losses) for _, terms in culprits) else "the gradient"
        raise self._not_finite(what, reports)

    def _not_finite(self, what: str, batches: list[str]) -> NonFiniteLossError:
        saved = self.last_checkpoint()
        lines = [
            f"{what} is infinite or NaN at iteration {self.iter}; training stops before the "
            "optimizer's step, and nothing is saved from here on",
            *(f"  batch: {batch}" for batch in batches),
            f"  last good checkpoint: {saved}" if saved else "  no checkpoint was due yet",
            "  look at these images and boxes; if they are right, lower optimizer.lr or "
            "train.clip_grad.max_norm, or set train.amp.enabled=false, and continue with --resume",
        ]
        return NonFiniteLossError("\n".join(lines))

    def _log(self, metrics: dict[str, float], data_time: float) -> None:
        if (self.iter + 1) % self.gather_metric_period:
            return
        everyone = comm.gather({**metrics, "data_time": data_time})
        if comm.is_main_process():
            mean = {key: float(np.mean([m[key] for m in everyone])) for key in metrics}
            slowest = max(m["data_time"] for m in everyone)
            self.storage.put_scalars(**mean, data_time=slowest)


def micro_batches(batch: list[dict], count: int) -> list[list[dict]]:
    """`count` equal parts, in order. Raises `ConfigError` where the batch can't be cut so."""
    size, rest = divmod(len(batch), count)
    if rest or not size:
        raise ConfigError(
            f"the batch of a process has {len(batch)} samples, which can't be cut into "
            f"train.accumulate={count} equal parts"
        )
    return [batch[i : i + size] for i in range(0, len(batch), size)]


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Of the normalisation that learns them: each process from its own part of the batches."""
    return [
        buffer
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
        for buffer in (module.running_mean, module.running_var)
    ]


def seed_everything(*entropy: int) -> None:
    """Seeds torch, numpy and random with a well mixed function of the numbers."""
    state = np.random.SeedSequence(entropy).generate_state(3)
    torch.manual_seed(int(state[0]))
    np.random.seed(state[1])
    random.seed(int(state[2]))


def amp_dtype(amp: Mapping | None, device: str) -> torch.dtype | None:
    """The type of autocast that ``train.amp`` asks for, None where it isn't enabled, or on a CPU
    without instructions for bfloat16, which takes up to thirty times as long as in float32.

    Raises `ConfigError` for a type that `device` can't train in.
    """
    if not amp or not amp["enabled"]:
        return None
    name = amp["dtype"]
    if name not in AMP_DTYPES:
        raise ConfigError(f"train.amp.dtype={name!r} is unknown; choose from {list(AMP_DTYPES)}")
    if name == "float16" and device == "cpu":
        raise ConfigError("train.amp.dtype=float16 needs CUDA; use bfloat16 on CPU")
    if device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        logger.warning("This CPU has no instructions for bfloat16: training in float32")
        return None
    return AMP_DTYPES[name]


def autocast(device: str, dtype: torch.dtype | None):
    """Autocast to `dtype`, or nothing where it is None."""
    return nullcontext() if dtype is None else torch.autocast(device, dtype)


def _bad(terms: Mapping[str, float], losses: list[str]) -> bool:
    return not all(math.isfinite(terms[name]) for name in losses)


def _file_names(batch: list[dict]) -> str:
    return ", ".join(str(sample.get("file_name", "?")) for sample in batch)
