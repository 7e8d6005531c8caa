"""The files that a run's metrics are written to; a full disk is no reason for them to end it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from detectron2.utils.events import JSONWriter, TensorboardXWriter

from ..files import LogFile

logger = logging.getLogger(__name__)


class MetricsFile(JSONWriter):
    """Detectron2's, of metrics.json: a row that there is no room for is written when there is.
    Where one is left, `settle` and `close` raise `DiskFullError`.

    Args:
        window: iterations of whose values a row has the median.
    """

    def __init__(self, path: Path, window: int) -> None:
        super().__init__(str(path), window)
        self._file_handle.close()
        self._file_handle = LogFile(path, durable=True)

    def settle(self) -> None:
        self._file_handle.settle()


class TensorBoard(TensorboardXWriter):
    """Detectron2's. Its events are those of metrics.json once more: where they can't be written, a
    warning says so, and there are none from then on."""

    def __init__(self, folder: str | Path, window: int, purge_step: int) -> None:
        super().__init__(str(folder), window, purge_step=purge_step)
        self.ended = False
        self._usual_hook, threading.excepthook = threading.excepthook, self._hook

    def write(self) -> None:
        self._unless_ended(super().write)

    def close(self) -> None:
        self._unless_ended(super().close)
        threading.excepthook = self._usual_hook

    def _unless_ended(self, call: Callable[[], None]) -> None:
        if self.ended:
            return
        try:
            call()
        except OSError as error:
            self.ended = True
            logger.warning(
                "TensorBoard's events in %s can't be written (%s): they end here, all else goes "
                "on; metrics.json has the same values",
                self._writer_args["log_dir"],
                error.strerror or error,
            )

    def _hook(self, arguments: threading.ExceptHookArgs) -> None:
        # TensorBoard's own thread: its error is raised again where the next event is written.
        if not isinstance(arguments.exc_value, OSError):
            self._usual_hook(arguments)
