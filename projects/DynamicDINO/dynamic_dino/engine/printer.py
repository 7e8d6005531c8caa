"""The line that a training run prints."""

from __future__ import annotations

import datetime
import logging
import re

import torch
from detectron2.utils.events import EventWriter, get_event_storage

logger = logging.getLogger(__name__)

_AUXILIARY = re.compile(r"\d|_selection|_dn")


class ProgressPrinter(EventWriter):
    """Iteration, time left, total loss and its last-layer terms, rate, time per iteration, memory.

    Auxiliary losses (earlier layers, query selection, denoising) go to the metrics file and
    TensorBoard only.
    """

    def __init__(self, max_iter: int, window: int = 20) -> None:
        self.max_iter, self.window = max_iter, window

    def write(self) -> None:
        storage = get_event_storage()
        histories = storage.histories()
        if storage.latest().get("total_loss", (0, -1))[1] != storage.iter:
            return  # after the end, or after an iteration that failed

        def smooth(name: str) -> float:
            return histories[name].median(self.window)

        words = [f"iter {storage.iter + 1}/{self.max_iter}"]
        if "time" in histories:
            seconds = histories["time"].median(1000) * (self.max_iter - storage.iter - 1)
            words.append(f"eta {datetime.timedelta(seconds=int(seconds))}")
        names = [n for n in histories if n.startswith("loss") and not _AUXILIARY.search(n)]
        words += [f"{name} {smooth(name):.4g}" for name in ["total_loss", *names, "grad_norm"]]
        if "lr" in histories:
            words.append(f"lr {histories['lr'].latest():.3g}")
        if "time" in histories:
            words.append(f"{smooth('time'):.3f} s/it (data {smooth('data_time'):.3f})")
        if torch.cuda.is_available():
            words.append(f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
        logger.info("  ".join(words))
