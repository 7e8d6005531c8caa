"""Signals that ask a run to end: it does so with a checkpoint, and a status that says "go on".

Clusters send one some time before they take a machine away. The first is only noted; whoever does
work that can be gone on with asks for it at a good moment: the trainer after an iteration, in all
processes the same one, an evaluation after a batch.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children
from types import FrameType

from ..data.workers import SIGNALS, loading_errors

logger = logging.getLogger(__name__)

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: a failure that passes, try again
AT_ONCE = 1.0  # seconds: one request may come twice, from Slurm and from a launcher


class Preempted(SystemExit):
    """The run was asked to end and did, in good order; it ends the process with `EXIT_CODE`.

    Attributes:
        signal: the name of what asked this process; empty if another one of the run was asked.
    """

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)
        self.signal = requested()


@dataclass
class _Request:
    signal: str = ""
    since: float = 0.0


_request = _Request()


def requested() -> str:
    """The name of the signal that asked this process to end; empty if none did."""
    return _request.signal


class Stoppable:
    """The batches of a loader, until the process is asked to end: then raises `Preempted`. What was
    found in those before is kept elsewhere."""

    def __init__(self, loader: Iterable) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        batches = iter(self.loader)
        while True:
            with loading_errors(lambda: "then start it again: what it found is kept"):
                batch = next(batches, None)
            if batch is None:
                return
            if name := requested():
                logger.warning("%s: the evaluation ends here (status %d)", name, EXIT_CODE)
                raise Preempted
            yield batch


@contextmanager
def noted_signals() -> Iterator[None]:
    """Within it, the first of `SIGNALS` is noted, see `requested`, and a second one, if it comes
    more than a second later, ends the process at once.

    Python takes signals in the main thread only; in others this does nothing.
    """
    owner = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not _request.signal:
            _request.signal, _request.since = signal.Signals(number).name, now
            if os.getpid() == owner:  # logging might be what was interrupted
                os.write(2, f"{_request.signal}: ending in good order\n".encode())
        elif now - _request.since > AT_ONCE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    with _handled_by(note):
        try:
            yield
        finally:
            _request.signal = ""


@contextmanager
def passed_on_signals() -> Iterator[None]:
    """Within it, `SIGNALS` go to the processes that this one has started, and not to itself."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in active_children():
            os.kill(child.pid, number)

    with _handled_by(pass_on):
        yield


@contextmanager
def _handled_by(handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    heeded = [number for number in numbers if before[number] is not signal.SIG_IGN]  # nohup
    for number in heeded:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])
