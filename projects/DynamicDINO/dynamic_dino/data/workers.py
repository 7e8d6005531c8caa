"""What ends a worker of a loader: its loader, and no signal that is meant for the run.

Schedulers and launchers send theirs to all processes of a job. The run wants to finish its
iteration then, for which it needs its workers; PyTorch's heed SIGTERM, whoever sends it.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..config import ConfigError

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")  # that ask a run to end


class WorkerEndedError(RuntimeError):
    """A worker of a loader was ended from outside."""


@contextmanager
def loading_errors(what_next: Callable[[], str]) -> Iterator[None]:
    """What a loader raises within it, also in a worker, becomes an error of one line, which
    `what_next` ends: `ConfigError` for a record that can't be read, `WorkerEndedError` for a worker
    that is gone."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        # of a worker's, torch makes a text that ends with "ValueError: ..."
        line = re.sub(r"^[\w.]*Error: ", "", str(error).strip().splitlines()[-1])
        raise ConfigError(f"{line}; {what_next()}") from error
    except (RuntimeError, ConnectionError, EOFError) as error:  # a pipe may notice it first
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        said = (str(error) or repr(error)).splitlines()[0]
        raise WorkerEndedError(
            f"a worker of the data loader was ended from outside ({said}), by the system where "
            "memory was short: take fewer (dataloader.*.num_workers), or a machine with more "
            f"memory; {what_next()}"
        ) from error


def heed_loader_only(worker: int = 0) -> None:
    """The ``worker_init_fn`` of a loader: of `SIGNALS`, only SIGTERM of the process that has
    started this one ends it. Where the system doesn't tell who sent a signal (macOS, Windows), it
    does nothing."""
    if not hasattr(signal, "sigwaitinfo"):
        return
    numbers = {getattr(signal, name) for name in SIGNALS}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def wait() -> None:
        while True:
            info = signal.sigwaitinfo(numbers)
            if info.si_signo == signal.SIGTERM and info.si_pid == os.getppid():
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
