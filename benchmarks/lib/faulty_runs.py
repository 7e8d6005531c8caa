"""Runs of the smallest recipe that are killed, disturbed or started on damaged files, and what is
left of them, compared with an undisturbed run.

A run is a fork of this process, which has imported everything: the start of another Python would
take most of the time. A kill -9 of it is one of any other.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dynamic_dino.data.datasets import register_builtin
from dynamic_dino.data.synthetic.drawn import write_drawn_dataset
from dynamic_dino.data.workers import SIGNALS
from dynamic_dino.engine import cli
from dynamic_dino.engine.checkpointing import last_checkpoint, read_checkpoint
from dynamic_dino.engine.preemption import EXIT_CODE
from dynamic_dino.files import configs_folder

from lib.bad_inputs import SMALL

LAST = 15  # iteration
SHORT = [
    *SMALL,
    f"train.max_iter={LAST + 1}",
    "train.eval_period=6",
    "train.checkpointer.period=4",
    "train.checkpointer.max_to_keep=2",
    "train.log_period=2",
    "train.num_threads=1",
    "train.ema.enabled=true",
    "dataloader.train.total_batch_size=2",
    "dataloader.test.val.batch_size=1",
]
RECIPES = {
    "dense": ("pretrain/nano_drawn.py", SHORT),
    "DynMoE": (
        "dynmoe/nano_drawn.py",
        [*SHORT, "train.init_checkpoint=", "train.trainable=null"]
        + ["train.adaptive_experts.period=5", "train.adaptive_experts.window=4"],
    ),
}
TIMES = ("time", "data_time", "rank_data_time", "eta_seconds")
PATIENCE = 300.0  # seconds for anything to happen


class End(NamedTuple):
    """How a process ended: its exit status, negative for a signal, and what it printed."""

    status: int
    said: str

    def one_line(self, *words: str) -> str:
        """What is wrong with it as one clear error that has these words; "" if nothing is."""
        if self.status in (0, None) or "Traceback" in self.said:
            return f"status {self.status}: {self.said.strip()[-300:]}"
        errors = [line for line in self.said.splitlines() if "error: " in line]
        if len(errors) != 1 or not all(word in errors[0] for word in words):
            return f"not one error with {words}: {errors or self.said.strip()[-300:]}"
        return ""


class Bench:
    """A folder with the drawn data set, and undisturbed runs to compare with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "datasets"
        if not (self.data / "drawn").is_dir():
            write_drawn_dataset(self.data, 16, 64)
            write_drawn_dataset(self.data, 6, 64, seed=1, split="val")
        os.environ["DETECTRON2_DATASETS"] = str(self.data)
        register_builtin(self.data)
        torch.set_num_threads(1)
        self.seconds: dict[str, float] = {}

    # ---- processes

    def start(self, out: Path, work: Callable[[], Any]) -> BaseProcess:
        """A process that does it, and writes what it prints to OUT.log."""

        def main() -> None:
            log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            sys.stdout = open(1, "w", buffering=1, closefd=False)
            sys.stderr = open(2, "w", buffering=1, closefd=False)
            for name in SIGNALS:  # a shell, or nohup, may have had this process ignore some
                usual = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
                signal.signal(getattr(signal, name), usual)
            try:
                end = work()
            except SystemExit as error:
                if isinstance(error.code, str):
                    print(error.code, file=sys.stderr)
                end = 1 if isinstance(error.code, str) else error.code
            except BaseException:
                traceback.print_exc()
                end = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end if isinstance(end, int) else 0)

        out.parent.mkdir(parents=True, exist_ok=True)
        process = multiprocessing.get_context("fork").Process(target=main)
        process.start()
        return process

    def end(self, process: BaseProcess, out: Path) -> End:
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            process.join()
            return End(0, f"HANG: nothing for {PATIENCE:g} s")
        log = Path(f"{out}.log")
        said = log.read_text(errors="replace") if log.exists() else ""
        log.unlink(missing_ok=True)
        return End(process.exitcode, said)

    def do(self, out: Path, work: Callable[[], Any]) -> End:
        return self.end(self.start(out, work), out)

    def train(
        self,
        out: Path,
        *more: str,
        recipe: str = "dense",
        flags: Sequence[str] = ("--resume",),
        before: Callable[[], Any] | None = None,
    ) -> BaseProcess:
        """train_net.py of a recipe under way; `before` is done in its process first."""
        file, overrides = RECIPES[recipe]
        command = ["--config-file", str(configs_folder() / file), "--num-gpus", "0", *flags]

        def work() -> None:
            if before:
                before()
            cli.main([*command, *overrides, f"train.output_dir={out}", *more])

        return self.start(out, work)

    def trained(self, out: Path, *more: str, **options: Any) -> End:
        return self.end(self.train(out, *more, **options), out)

    def wait(self, process: BaseProcess, when: Callable[[], bool]) -> bool:
        """Until something is so; False where the process ended before."""
        start = time.monotonic()
        while process.is_alive() and time.monotonic() - start < PATIENCE:
            if when():
                return True
            time.sleep(0.001)
        return False

    # ---- folders

    def whole(self, recipe: str = "dense") -> Path:
        """The folder of an undisturbed run."""
        out = self.folder / f"whole {recipe}"
        if not (out / "results.json").is_file() or recipe not in self.seconds:
            shutil.rmtree(out, ignore_errors=True)
            start = time.monotonic()
            end = self.trained(out, recipe=recipe)
            if end.status:
                raise RuntimeError(f"the undisturbed run failed:\n{end.said[-2000:]}")
            self.seconds[recipe] = time.monotonic() - start
        return out

    def half(self) -> Path:
        """A copy of the folder of a run that was asked to end in the middle."""
        source = self.folder / "half"
        if not source.is_dir():
            process = self.train(source)
            self.wait(process, lambda: len(rows(source)) > 4)
            os.kill(process.pid, signal.SIGUSR1)
            end = self.end(process, source)
            if end.status != EXIT_CODE:
                raise RuntimeError(f"status {end.status}:\n{end.said[-2000:]}")
        return self.copy(source)

    def copy(self, source: Path) -> Path:
        out = self.folder / "disturbed"
        shutil.rmtree(out, ignore_errors=True)
        Path(f"{out}.log").unlink(missing_ok=True)
        return Path(shutil.copytree(source, out))

    def fresh(self, name: str = "disturbed") -> Path:
        out = self.folder / name
        shutil.rmtree(out, ignore_errors=True)
        Path(f"{out}.log").unlink(missing_ok=True)
        return out

    def resumed(self, out: Path, *more: str, recipe: str = "dense", but: Sequence[str] = ()) -> str:
        """Resumes it to the end; what differs then from an undisturbed run, "" if nothing does."""
        end = self.trained(out, *more, recipe=recipe)
        if end.status or "Traceback" in end.said:
            return f"resumed: status {end.status}: {end.said.strip()[-300:]}"
        return unlike(out, self.whole(recipe), but)


def rows(out: Path) -> list[dict]:
    """Of metrics.json, without times."""
    file = out / "metrics.json"
    if not file.is_file():
        return []
    found = []
    for line in file.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # it is being written
            continue
        found.append({key: value for key, value in row.items() if key not in TIMES})
    return found


def unlike(out: Path, whole: Path, but: Sequence[str] = ()) -> str:
    """What of a run isn't bit for bit as in another one: weights, averages, optimizer and all else
    in its checkpoints, the best one, rows of metrics, results.json, the files that there are."""
    for name in ("model_final.pth", "model_best.pth"):
        if name in but:
            continue
        if not (out / name).is_file():
            return f"{name} is missing"
        found, wanted = (torch.load(path / name, weights_only=True) for path in (out, whole))
        if name == "model_best.pth":  # which also holds how the run came to it
            keys = ("model", "ema", "best", "iteration")
            found, wanted = ({k: c.get(k) for k in keys} for c in (found, wanted))
        if differing := _differing(found, wanted):
            return f"{name}: {differing} differs"
    ours, theirs = ([repr(row) for row in rows(path)] for path in (out, whole))  # NaN equals NaN
    if ours != theirs:
        odd = [row[:60] for row in ours if row not in theirs]
        gone = [row[:60] for row in theirs if row not in ours]
        return f"metrics.json: rows {odd} are new, {gone} are missing, of {len(theirs)}"
    if json.loads((out / "results.json").read_text()) != json.loads(
        (whole / "results.json").read_text()
    ):
        return "results.json differs"
    names = [sorted(p.name for p in f.glob("*.pth") if p.name not in but) for f in (out, whole)]
    return "" if names[0] == names[1] else f"files {names[0]}, not {names[1]}"


def _differing(a: Any, b: Any, path: str = "") -> str:
    """The first place where two nested states aren't bit for bit equal."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return "" if same and torch.equal(_bits(a), _bits(b)) else path
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next((d for key in a if (d := _differing(a[key], b[key], f"{path}.{key}"))), "")
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return next((d for i, (x, y) in pairs if (d := _differing(x, y, f"{path}.{i}"))), "")
    return "" if type(a) is type(b) and repr(a) == repr(b) else path or "all"


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


# ---- kills --------------------------------------------------------------------------------------

MOMENTS = ("starting", "any time", "saving", "saving", "evaluating", "evaluating")


def killed_chain(bench: Bench, recipe: str, rng: random.Random) -> dict:
    """Kills a run again and again, -9, at `MOMENTS` in random order, then lets it end, and compares
    it with an undisturbed one. What it returns stands in reliability.json."""
    bench.whole(recipe)
    out = bench.fresh()
    kills: list[dict] = []
    lost, kept = "", -1
    for moment in rng.sample(MOMENTS, len(MOMENTS)):
        process = bench.train(out, recipe=recipe)
        if not bench.wait(process, _moment(moment, out, bench.seconds[recipe], rng)):
            break  # it has ended
        process.kill()
        process.join()
        found = _saved(out)
        kills.append({"moment": moment, "rows": len(rows(out)), "checkpoint": found})
        lost = lost or (f"after kill {len(kills)}: {found}" if _lost(found, kept) else "")
        kept = found if isinstance(found, int) else kept
    differs = bench.resumed(out, recipe=recipe)
    return {"recipe": recipe, "kills": kills, "checkpoint_lost": lost, "differs": differs}


def _moment(moment: str, out: Path, seconds: float, rng: random.Random) -> Callable[[], bool]:
    """Says when it has come, asked all the time from the start of a process on."""
    start = time.monotonic()
    if moment in ("starting", "any time"):
        first, last = (0, 0.4) if moment == "starting" else (0.4, 1)
        at = rng.uniform(first, last) * seconds
        return lambda: time.monotonic() - start > at
    if moment == "evaluating":
        more, before = rng.randint(1, 5), _evaluated(out)
        return lambda: _evaluated(out) >= before + more
    skip, delay, seen = rng.randrange(3), rng.uniform(0, 0.02), set()

    def saving() -> bool:
        new = {p.name for p in out.glob("model_*.partial")} - seen
        seen.update(new)
        if new and len(seen) > skip:
            time.sleep(delay)
            return True
        return False

    return saving


def _evaluated(out: Path) -> int:
    """Lines in the logs of evaluations under way."""
    try:
        logs = [*(out / "evaluation").glob("*/unfinished/*.log")]
        return sum(log.read_bytes().count(b"\n") for log in logs)
    except OSError:  # the evaluation ended in between
        return 0


def _saved(out: Path) -> int | str | None:
    """The iteration of the last checkpoint; what is wrong with it; None where there is none yet."""
    try:
        path = last_checkpoint(out)
        return None if path is None else read_checkpoint(path)["iteration"]
    except (ValueError, OSError) as error:
        return str(error)


def _lost(found: int | str | None, before: int) -> bool:
    return (
        isinstance(found, str)
        or (found is None and before >= 0)
        or (isinstance(found, int) and found < before)
    )
