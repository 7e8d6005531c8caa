#!/usr/bin/env python
"""Trains the rows of a sweep, seed by seed, each beside its control, and writes ABLATIONS.md.

    python benchmarks/ablations.py routers                   # every row that isn't done, seed 0
    python benchmarks/ablations.py gates --seeds 0 1 2
    python benchmarks/ablations.py gates --only indicator --dry-run
    python benchmarks/ablations.py gates train.num_threads=1 dataloader.train.num_workers=0
    python benchmarks/ablations.py routers --times 5         # step times of its rows, in turns
    python benchmarks/ablations.py                           # the page alone; --check: is it true?

What is done is left out; what was interrupted goes on (`train_net.py --resume`): start the same
command again. With GPUs each gets one run at a time, otherwise runs come one after the other.
Features of frozen backbones are cached where the setting names a folder for them. A run leaves its
checkpoints in output/ablations/SETTING/ROW/seedN and its numbers in
benchmarks/results/<machine>/ablations/SETTING/ROW-seedN.json, which belong into the repository.
The sweeps are declared in sweeps.py.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO

import numpy as np
import torch
from dynamic_dino.config import ConfigError, load_config
from dynamic_dino.console import command
from dynamic_dino.engine.setup import resolve_device
from lib import ablations_page
from lib.detectors import ROOT
from lib.finished_run import read_folder
from lib.flop_count import measure
from lib.provenance import provenance, results_folder, write_json
from lib.sweep_times import step_times
from lib.sweeps import SETTINGS, SWEEPS, Setting

PACKAGES = ("torch", "transformers", "timm", "numpy", "scipy", "faster-coco-eval")
LOG = "sweep.log"
OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
SPEED_ONLY = (  # overrides that a result doesn't depend on
    "train.num_threads",
    "train.log_period",
    "dataloader.train.num_workers",
    "dataloader.train.mapper.features",
)


@dataclass(frozen=True)
class Run:
    """One row, trained with one seed."""

    setting: Setting
    row: str
    seed: int
    device: str
    changes: tuple[str, ...] = ()  # overrides of the command line

    @property
    def name(self) -> str:
        return f"{self.setting.name}/{self.row} seed {self.seed}"

    @property
    def folder(self) -> Path:
        return Path("output/ablations") / self.setting.name / self.row / f"seed{self.seed}"

    @property
    def result(self) -> Path:
        name = f"{self.row}-seed{self.seed}.json"
        return results_folder(self.device) / "ablations" / self.setting.name / name

    @property
    def config_file(self) -> str:
        return f"configs/{self.setting.rows[self.row].config}.py"

    @property
    def base(self) -> Run | None:
        """The run whose last weights this one starts from."""
        if not (base := self.setting.rows[self.row].base):
            return None
        seed = 0 if self.setting.rows[base].once else self.seed
        return Run(self.setting, base, seed, self.device, self.changes)

    @property
    def overrides(self) -> list[str]:
        """All that the run changes of its recipe, but where its output goes."""
        setting, row = self.setting, self.setting.rows[self.row]
        found = [*setting.overrides]
        if self.base:
            found.append(f"train.init_checkpoint={self.base.folder}/model_final.pth")
        found += row.overrides
        found += [f"train.seed={self.seed}", f"dataloader.train.seed={self.seed}"]
        return [*found, *features(setting), *self.changes]

    def command(self, flags: Sequence[str] = ("--resume",)) -> list[str]:
        """Of train_net.py, without the interpreter."""
        config = ["--config-file", self.config_file]
        output = [f"train.output_dir={self.folder}"]
        return ["projects/DynamicDINO/train_net.py", *config, *flags, *output, *self.overrides]

    def is_done(self) -> bool:
        """Raises SystemExit where the result is that of another recipe."""
        if not self.result.is_file():
            return False
        found, mine = (
            [o for o in overrides if not o.startswith((*SPEED_ONLY, "dataloader.test"))]
            for overrides in (json.loads(self.result.read_text())["overrides"], self.overrides)
        )
        if found != mine:
            other = " ".join(sorted({*found} ^ {*mine}))
            raise SystemExit(
                f"{self.result} was trained with other settings ({other}): delete it to train anew"
            )
        return True


def features(setting: Setting) -> list[str]:
    """Overrides that name the folders of cached features."""
    if not setting.features:
        return []
    tests = [f"dataloader.test.{name}" for name in setting.tests]
    return [
        f"{loader}.mapper.features={setting.features[split]}"
        for split, loaders in (("train", ["dataloader.train"]), ("test", tests))
        for loader in loaders
    ]


# ---- running ------------------------------------------------------------------------------------


def run_all(runs: Sequence[Run], launcher: Sequence[str], workers: int) -> list[Run]:
    """Trains the runs, `workers` at a time, each with a GPU of its own if there are GPUs; returns
    those that failed."""
    gpus: SimpleQueue[int] = SimpleQueue()
    for gpu in range(workers):
        gpus.put(gpu)
    failed = []

    def work(position: int) -> None:
        run, gpu = runs[position], gpus.get()
        say = Progress(f"[{position + 1}/{len(runs)}] {run.name}", alone=workers == 1)
        try:
            if not train(run, launcher, gpu, say):
                failed.append(run)
        finally:
            gpus.put(gpu)

    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(work, i) for i in range(len(runs))]:
            future.result()
    return failed


def train(run: Run, launcher: Sequence[str], gpu: int, say: Progress) -> bool:
    """Trains and evaluates, or goes on with it; keeps the numbers. False where it failed."""
    folder = ROOT / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, say) as lock:
        while phase := next_phase(folder):
            if execute(run, phase, launcher, gpu, lock, say):
                say(f"failed, see {folder / LOG}", final=True)
                return False
        write_json(run.result, report := summarise(run))
    first = run.setting.tests[0]
    say(f"AP50 {report['scores'][f'{first}/AP50']:.1f} on {first}", final=True)
    return True


@contextmanager
def locked(folder: Path, say: Progress) -> Iterator[IO]:
    """The folder for this process and the ones that inherit the file: where a runner was killed,
    its training may still go on."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waits for the process that trains it already", final=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def next_phase(folder: Path) -> list[str] | None:
    """Flags of the next call of train_net.py, None where training and evaluation are done."""
    final, results = folder / "model_final.pth", folder / "results.json"
    if not final.is_file():
        return ["--resume"]
    done = results.is_file() and results.stat().st_mtime >= final.stat().st_mtime
    return None if done else ["--eval-only", "--resume"]


def execute(
    run: Run, phase: list[str], launcher: Sequence[str], gpu: int, lock: IO, say: Progress
) -> int:
    """Runs train_net.py; returns its exit status."""
    environment = dict(os.environ)
    if run.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    else:
        phase = [*phase, "--num-gpus", "0"]
    command = [*launcher, sys.executable, *run.command(phase)]
    log = ROOT / run.folder / LOG
    with log.open("ab") as file:
        start = file.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, pass_fds=[lock.fileno()]
        )
        try:
            while process.poll() is None:
                say(last_line(log, start))
                time.sleep(1)
        finally:
            process.terminate()  # of no effect if it is over
    return process.returncode


def last_line(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 2000))
        lines = file.read().decode(errors="replace").split("\n")
    found = [line for line in lines if "iter " in line or "Inference done" in line]
    return found[-1].split("]: ")[-1].strip()[:90] if found else "starting"


class Progress:
    """The state of a run as one line, rewritten where it stands alone on a terminal."""

    lock = threading.Lock()

    def __init__(self, title: str, alone: bool) -> None:
        self.title, self.rewrite = title, alone and sys.stderr.isatty()
        self.said = 0.0

    def __call__(self, text: str, final: bool = False) -> None:
        if not (final or self.rewrite) and time.monotonic() - self.said < 60:
            return
        self.said = time.monotonic()
        with self.lock:
            start, end = ("\r\033[K", "\n" if final else "") if self.rewrite else ("", "\n")
            print(f"{start}{self.title}: {text}", end=end, file=sys.stderr, flush=True)


# ---- what is kept of a run ----------------------------------------------------------------------


def summarise(run: Run) -> dict:
    """A run's result: where it comes from, scores, routing, parameters, operations."""
    folder = ROOT / run.folder
    finished = read_folder(folder)
    losses = [row["total_loss"] for row in finished.metrics if "total_loss" in row]
    tests = {
        name: json.loads((folder / "evaluation" / name / "results.json").read_text())
        for name in run.setting.tests
    }
    routing = tests[run.setting.tests[0]]["routing"]
    report = provenance(PACKAGES, run.device)
    report["command"] = " ".join(["python", *run.command()])
    return report | {
        "setting": run.setting.name,
        "row": run.row,
        "seed": run.seed,
        "config": run.config_file,
        "overrides": run.overrides,
        "iterations": finished.iterations,
        "images": {name: test["images"] for name, test in tests.items()},
        "scores": {
            k: round(v, 3)
            for k, v in finished.scores.items()
            if k.count("/") == 1 and v is not None
        },
        "routing": [{k: _rounded(v) for k, v in layer.items()} for layer in routing],
        "last_loss": round(losses[-1], 4),
        **size(run, routing),
    }


def _rounded(value: float | list) -> float | list:
    return [_rounded(v) for v in value] if isinstance(value, list) else round(value, 4)


def size(run: Run, routing: list[dict]) -> dict:
    """FLOPs of one image, and parameters, both by the experts that tokens of the test set took."""
    cfg = load_config(ROOT / run.config_file, run.overrides)
    taken = [layer["experts_per_token"] for layer in routing]
    found = measure(cfg.model, cfg.train.trainable, (cfg.model.canvas,) * 2, taken=taken)
    return {"flops": found["flops"], "parameters": found["parameters"]}


def measure_times(options: argparse.Namespace) -> int:
    """Step times of a sweep's rows, kept beside its results."""
    sweep = SWEEPS[options.sweep]
    device = resolve_device(options.device)
    runs = [Run(SETTINGS[sweep.setting], row, 0, device, options.overrides) for row in sweep.rows]
    recipes = {run.row: load_config(ROOT / run.config_file, run.overrides) for run in runs}
    if threads := next(iter(recipes.values())).train.num_threads:
        torch.set_num_threads(threads)
    report = provenance(("torch",), device) | {"threads": torch.get_num_threads()}
    report["rows"] = step_times(recipes, device, options.times)
    write_json(ablations_page.times_path(results_folder(device), sweep), report)
    return ablations_page.main()


# ---- the script ---------------------------------------------------------------------------------


def cache_features_of(run: Run) -> None:
    """Makes the caches of the setting, or goes on with them."""
    marks = [ROOT / folder / "done.npy" for folder in (run.setting.features or {}).values()]
    if all(mark.is_file() and np.load(mark).all() for mark in marks):
        return
    module = ["-m", "dynamic_dino.data.feature_cache", "--config-file", run.config_file]
    subprocess.run([sys.executable, *module, *features(run.setting)], cwd=ROOT, check=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(SWEEPS)
    parser.add_argument("sweep", nargs="?", help=f"one of {names}; none: write the page")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows; default: all, and control")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu (default: %(default)s)")
    parser.add_argument(
        "--launcher",
        type=shlex.split,
        default=[],
        metavar="WORDS",
        help="what stands before each training command, such as 'nice -n 10'",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument(
        "--times", type=int, metavar="N", help="don't train: time N steps of each row, in turns"
    )
    parser.add_argument("--check", action="store_true", help="is the page that of the results?")
    parser.epilog = "key=value: overrides of all recipes, as in train_net.py"
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args([word for word in words if not OVERRIDE.match(word)])
    options.overrides = tuple(word for word in words if OVERRIDE.match(word))
    if options.sweep is None:
        return options
    if options.sweep not in SWEEPS:
        parser.error(f"unknown sweep {options.sweep!r}; there are {names}")
    if unknown := set(options.only or ()) - set(SWEEPS[options.sweep].rows):
        rows = ", ".join(SWEEPS[options.sweep].rows)
        parser.error(f"sweep {options.sweep} has no row {min(unknown)!r}; it has {rows}")
    return options


@command
def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.sweep is None or options.check:
        return ablations_page.main(options.check)
    try:
        bases, runs = planned(options)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    if options.times:
        return measure_times(options)
    if options.dry_run:
        for run in [*bases, *runs]:
            print(shlex.join([*options.launcher, "python", *run.command()]))
        return 0
    failed = []
    if bases or runs:
        cache_features_of([*bases, *runs][0])
        gpus = torch.cuda.device_count() if options.device == "cuda" else 1
        failed = run_all(bases, options.launcher, 1) or run_all(runs, options.launcher, gpus)
    ablations_page.main()
    for run in failed:
        print(f"failed: {run.name}", file=sys.stderr)
    return 1 if failed else 0


def planned(options: argparse.Namespace) -> tuple[list[Run], list[Run]]:
    """What there is to train: what others start from, and then seed by seed, so that pairs with the
    control come early."""
    sweep = SWEEPS[options.sweep]
    setting = SETTINGS[sweep.setting]
    options.device = resolve_device(options.device)
    rows = options.only or list(dict.fromkeys([sweep.control, *sweep.rows]))
    runs = [
        Run(setting, row, seed, options.device, options.overrides)
        for seed in options.seeds
        for row in rows
    ]
    runs = [run for run in runs if not run.is_done()]
    bases: list[Run] = []
    for run in runs:
        while (run := run.base) and run not in bases:
            bases.insert(0, run)
    bases = [run for run in bases if next_phase(ROOT / run.folder) or not run.is_done()]
    for run in [*bases, *runs]:  # a mistake shows before hours of training
        load_config(ROOT / run.config_file, run.overrides)
    return bases, runs


if __name__ == "__main__":
    sys.exit(main())
