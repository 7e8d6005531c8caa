"""What ends a worker of a loader: its loader, and no signal that is meant for the run.

Schedulers and launchers send theirs to all processes of a job. The run wants to finish its
iteration then, for which it needs its workers; PyTorch's heed SIGTERM, whoever sends it.
"""

from __future__ import annotations

import os
import signal
import threading

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")  # that ask a run to end


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
