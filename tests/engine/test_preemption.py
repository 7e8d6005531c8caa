"""What a signal does to a process, and to the one that started it."""

import multiprocessing
import os
import signal
import time

import pytest
from dynamic_dino.engine import preemption
from dynamic_dino.engine.preemption import EXIT_CODE, Preempted, Stoppable, noted_signals

CONTEXT = multiprocessing.get_context("fork")


def start(work):
    """A process that calls work(ready) within `noted_signals`."""
    ready = CONTEXT.Event()

    def run():
        with noted_signals():
            work(ready)

    process = CONTEXT.Process(target=run)
    process.start()
    assert ready.wait(30)
    return process


def test_an_evaluation_ends_after_a_batch_and_the_launcher_passes_signals_on(tmp_path):
    def evaluate(ready):
        for batch in Stoppable(range(10**6)):
            (tmp_path / "batches").write_text(str(batch))
            ready.set()
            time.sleep(0.01)

    process = start(evaluate)
    with preemption.passed_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        process.join(30)
    assert process.exitcode == EXIT_CODE
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "as it was"


@pytest.mark.parametrize(("at_once", "ends"), [(1e9, False), (-1.0, True)])
def test_a_second_signal_ends_at_once(monkeypatch, at_once, ends):
    """Unless it comes with the first, as from Slurm and from a launcher."""
    noted = CONTEXT.Event()

    def stuck(ready):
        ready.set()
        while not preemption.requested():
            time.sleep(0.01)
        noted.set()
        time.sleep(60)

    monkeypatch.setattr(preemption, "AT_ONCE", at_once)
    process = start(stuck)
    os.kill(process.pid, signal.SIGTERM)
    assert noted.wait(30)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30 if ends else 0.3)
    assert process.exitcode == (-signal.SIGTERM if ends else None)
    process.kill()
    process.join()


def test_nothing_is_left_of_a_request():
    with noted_signals():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.requested() == "SIGUSR1"
    assert not preemption.requested()
    assert Preempted().code == EXIT_CODE
