"""Bad inputs, tried one after the other in a process of their own, and how each of them ended."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30
MEMORY = 2 * GIB  # that one input may take
ADDRESSES = 6 * GIB  # beyond which the system refuses memory, so that the machine survives
HANG = 60.0  # seconds without an answer

CLEAN, ACCEPTED, UNCLEAR = "clean", "accepted", "unclear"
TRACEBACK, WRONG, HANGS, LARGE = "traceback", "wrong", "hang", "memory"
OUTCOMES = (CLEAN, ACCEPTED, UNCLEAR, TRACEBACK, WRONG, HANGS, LARGE)


@dataclass(frozen=True)
class Trial:
    """An input and what is done with it.

    name      what was done to a valid input
    run       gives it to the product: raises what the product raises; else returns what is wrong
              with what the product made of it, "" if nothing is
    mentions  of which an error has to name one
    """

    name: str
    run: Callable[[], str]
    mentions: Sequence[str] = ()


@dataclass(frozen=True)
class Ended:
    """One of `OUTCOMES`, and the message, or what is wrong."""

    name: str
    outcome: str
    said: str = ""
    seconds: float = 0.0


def attempt(trial: Trial) -> Ended:
    """Tries one input in this process."""
    start = time.perf_counter()
    try:
        wrong = trial.run()
        outcome, said = (WRONG, wrong) if wrong else (ACCEPTED, "")
    except (ValueError, OSError) as error:  # of which the commands make one line
        outcome, said = judge_message(error, trial.mentions), f"{type(error).__name__}: {error}"
    except MemoryError as error:
        outcome, said = LARGE, place(error)
    except Exception as error:
        outcome, said = TRACEBACK, place(error)
    return Ended(trial.name, outcome, said[:400], round(time.perf_counter() - start, 3))


def judge_message(error: Exception, mentions: Sequence[str]) -> str:
    """Whether an error is one line that names one of `mentions`: the file, say."""
    text = str(error)
    raw = type(error) in (UnicodeDecodeError, UnicodeEncodeError, json.JSONDecodeError)
    named = not mentions or any(name in text for name in mentions)
    return CLEAN if "\n" not in text.strip() and named and not raw else UNCLEAR


def place(error: BaseException) -> str:
    """An exception and the line of the package that it went through last."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/dynamic_dino" in frame.filename] or frames
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
    return " ".join(f"{where}: {type(error).__name__}: {error}".split())


def try_all(trials: Sequence[Trial], hang: float = HANG) -> Iterator[Ended]:
    """Each in its turn, in a fork that has all that this process imported. One that gives no answer
    for `hang` seconds, or that the system ends, costs the fork; another goes on behind it."""
    context = multiprocessing.get_context("fork")
    i = 0
    while i < len(trials):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(trials[i:], theirs))
        process.start()
        theirs.close()
        try:
            while i < len(trials):
                if not ours.poll(hang):
                    yield Ended(trials[i].name, HANGS, f"no answer in {hang:g} s", hang)
                    break
                yield ours.recv()
                i += 1
        except EOFError:  # by the kernel for want of memory, or by a fault of a library
            process.join()
            yield Ended(trials[i].name, LARGE, f"ended by the system: {process.exitcode}")
        i += 1
        process.kill()
        process.join()
        ours.close()


def _answer(trials: Sequence[Trial], pipe) -> None:
    taken = int(re.search(r"VmSize:\s+(\d+)", _status())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (taken + ADDRESSES, resource.RLIM_INFINITY))
    nothing = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # warnings of decoders
        os.dup2(nothing, descriptor)
    for trial in trials:
        before = _peak(reset=True)
        ended = attempt(trial)
        if (more := _peak() - before) > MEMORY:
            said = f"{more / GIB:.1f} GiB; {ended.outcome}: {ended.said}"
            ended = Ended(ended.name, LARGE, said, ended.seconds)
        pipe.send(ended)
    pipe.close()


def _status() -> str:
    return Path("/proc/self/status").read_text()


def _peak(reset: bool = False) -> int:
    """The most memory that this process has had, in bytes, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", _status())[1]) << 10
