"""`AdaptiveExpertsHook`: DynMoE's adaptive process as a part of the training loop."""

from __future__ import annotations

import logging

from detectron2.engine import HookBase
from torch import nn

from ..moe.adaptive import AdaptiveExperts

logger = logging.getLogger(__name__)


class AdaptiveExpertsHook(HookBase):
    """Removes and adds experts every `period` iterations, by what the last `window` of them chose.

    Stands before the hooks that save and evaluate. Changes are logged, and counted as the metrics
    moe/layer<i>/removed and /added at their iteration.

    Raises:
        ValueError: the model has no `TopAnyRouter`, or `window` isn't between 1 and `period`.
    """

    def __init__(self, model: nn.Module, period: int, window: int) -> None:
        if not 1 <= window <= period:
            raise ValueError(
                f"train.adaptive_experts.window={window} must lie between 1 and period={period}"
            )
        self.process, self.period, self.window = AdaptiveExperts(model), period, window

    def after_step(self) -> None:
        step = self.trainer.iter + 1
        if (step - 1) % self.period >= self.period - self.window:
            self.process.record(self.trainer.routings)
        if step % self.period:
            return
        changes = self.process.adapt(self.trainer.optimizer)
        if self.trainer.ema is not None:
            self.process.follow(self.trainer.ema.model, changes)
        for change in changes:
            names = {"removed": change.removed, "added": change.added}
            for name, slots in names.items():
                key = f"moe/layer{change.layer}/{name}"
                self.trainer.storage.put_scalar(key, len(slots), smoothing_hint=False)
            logger.info(
                "Iteration %d, MoE layer %d: removed experts %s, added %s; %d are active",
                *(step - 1, change.layer, *names.values(), change.active),
            )
