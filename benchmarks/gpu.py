#!/usr/bin/env python3
"""What a GPU has to tell in ten minutes: do the kernels work there, and how fast is the detector?

    python3 benchmarks/gpu.py                             # ten minutes, into gpu_results/<gpu>/
    python3 benchmarks/gpu.py --seconds 300 --out results
    python3 benchmarks/gpu.py --only fps training_step --with fps="--batch 8 --repeats 100"
    python3 benchmarks/gpu.py --resume results --out more # goes on where another call stopped

Needs no network, no installation of this project, neither git nor make: of packages, what a usual
image for PyTorch has, and a folder .site beside it with the rest (`make gpu-site`, made where there
is a network). What is missing is said in one line, and the steps that need it are left out.

The steps stand in the order of what proves most per second. Each is a process with its own limit;
its output goes to log.txt, its numbers to a file as benchmarks/results.py reads them, and its fate
to steps.json, all at once: a call that is killed loses the step that was running, and of that not
the rows it had finished when only its limit ended it. A call plans with the seconds it has: the
last steps are left out where not all fit, and what one saves the next may use. A further call with
the same --out, or with --resume, does first what was never tried, then what failed.

Copy <gpu>/ to benchmarks/results/ and run benchmarks/results.py to get its tables. The exit status
is 1 if a step failed or was cut off, or could not run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / ".site"
# A step that gets less than this part of its limit is left out; one that could get more than that
# many limits has no use for it.
LEAST, MOST = 0.6, 2.0
STOPS = (signal.SIGTERM, signal.SIGINT)
UNREADABLE = 65  # instead of an exit status of 0, where the results of a step can't be read
GRACE = 5.0  # seconds that a process gets to end by itself, and that planning leaves for the rest
# What comes first is also what later steps can be compared with: dense and the paper's loop.
EDGE = "--sizes 640x640 --precisions float16 float32 --modes graph eager --text cached".split()
OURS = ["--only", "dense", "experts, grouped", "experts, triton"]


@dataclass(frozen=True)
class Step:
    """One process: `python *command`.

    limit: seconds after which it is ended. needs: a module without which it can't start.
    result: the file that its rows go to; the command gets `--json` with a path.
    tuned: runs with the tiles that the step "tune" found.
    """

    name: str
    limit: float
    command: list[str]
    needs: str
    result: str = ""
    tuned: bool = False


def all_steps() -> list[Step]:
    """In the order of what proves most per second. {seconds} and {workers} are filled in."""
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    fps = "benchmarks/fps.py"
    none, quick = ["--many-names", "0"], ["--repeats", "30"]
    half = "--precisions float16 --modes graph --text cached".split()
    tune = ["-m", "dynamic_dino_kernels.tune", "--tokens", "900", "--dtypes", "float16", "float32"]
    return [
        Step(
            "kernels",
            120,
            [*pytest, "tests/kernels", "--ignore", "tests/kernels/test_aot.py"],
            "hypothesis",
        ),
        Step("graphs", 45, [*pytest, "tests/serving/test_deploy.py", "-k", "graph"], "fps"),
        Step("fps", 110, [fps, *EDGE, *none, *quick], "fps", "fps"),
        Step(
            "layer",
            60,
            ["benchmarks/moe_layer.py", "--tokens", "900", "--dtypes", "float16", "float32"]
            + ["--routing", "uniform", *quick],
            "moe_layer",
            "moe_layer",
        ),
        Step(
            "tune",
            90,
            [*tune, "--forward-only", "--seconds", "{seconds}", "--workers", "{workers}"],
            "dynamic_dino_kernels.tune",
        ),
        Step(
            "fps_tuned",
            35,
            [fps, "--sizes", "640x640", *half, *OURS, *none, *quick],
            "fps",
            "fps_tuned",
            tuned=True,
        ),
        Step(
            "fps_large",  # with the many names of LVIS, since their images have this size
            70,
            [fps, "--sizes", "800x1333", *half, *OURS, "--many-names", "1203", "--repeats", "20"],
            "fps",
            "fps",
        ),
        Step(
            "training_step",
            60,
            ["benchmarks/training_step.py", "--backends", "grouped", "triton", "--repeats", "10"],
            "training_step",
            "training_step",
        ),
        Step(
            "public_weights",
            60,
            ["benchmarks/public_weights.py", "--dtype", "float16", "--accelerate", "graph"]
            + ["--photos", "2", "--repeats", "20"],
            "public_weights",
            "public_weights",
        ),
    ]


IMPORTS = Step("imports", 60, ["benchmarks/gpu.py", "--imports"], "")


def plan(steps: list[Step], seconds: float) -> dict[str, float]:
    """Limits of those steps, of these in this order, that fit into so many seconds."""
    chosen = list(steps)
    while chosen and LEAST * sum(step.limit for step in chosen) > seconds:
        chosen.pop()
    if not chosen:
        return {}
    factor = min(MOST, seconds / sum(step.limit for step in chosen))
    return {step.name: factor * step.limit for step in chosen}


# ---- what is there ------------------------------------------------------------------------------


def report_imports() -> int:
    """Prints what is there, and last one line of JSON: {"gpu", "machine", "missing"}."""
    try:
        import torch
    except ImportError as error:
        print(f"missing: {error}")
        return 1
    if not torch.cuda.is_available():
        print(f"missing: a CUDA GPU (PyTorch {torch.__version__} sees none)")
        return 1
    from importlib.metadata import PackageNotFoundError, version

    print(f"Python {sys.version.split()[0]}", end="")
    for package in ("torch", "triton", "numpy", "transformers", "timm", "torchvision"):
        try:
            print(f", {package} {version(package)}", end="")
        except PackageNotFoundError:
            print(f", no {package}", end="")
    print()
    missing = {}
    for module in dict.fromkeys(step.needs for step in all_steps()):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing[module] = error.name
        except Exception as error:  # a package that can't bear its neighbours, for example
            missing[module] = f"{type(error).__name__}: {error}".splitlines()[0]
    if missing:
        site = "" if SITE.exists() else "; there is no .site: see `make gpu-site`"
        print(f"missing: {', '.join(dict.fromkeys(missing.values()))}{site}")
    compilers = [os.environ.get("CC", "cc"), "gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        print("missing: a C compiler, with which Triton builds its launchers")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        print("missing: Python.h, with which Triton builds its launchers")
    from lib.provenance import machine_name, results_folder

    found = {"gpu": results_folder("cuda").name, "machine": machine_name("cuda")}
    print(json.dumps(found | {"missing": missing}))
    return 0


# ---- running ------------------------------------------------------------------------------------


def as_a_group() -> None:
    """In a new process: what it starts itself ends with it."""
    os.setpgrp()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


class Run:
    """A call of this script: the folder of the GPU, and what has become of each step.

    Attributes:
        steps: by name {"rc", "seconds", "limit", "headline"}; rc None: ended at its limit.
    """

    def __init__(self, out: Path, options: argparse.Namespace) -> None:
        self.out, self.options = out, options
        self.deadline = time.monotonic() + options.seconds
        self.folder = out
        self.machine, self.steps = "", {}
        self.process: subprocess.Popen | None = None

    def left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def tiles(self) -> Path:
        return self.folder / "tuned.json"

    def environment(self, step: Step) -> dict[str, str]:
        ours = [ROOT / "kernels", ROOT / "projects/DynamicDINO", ROOT / "benchmarks"]
        inherited = [path] if (path := os.environ.get("PYTHONPATH")) else []
        paths = [*map(str, ours), *inherited, str(SITE)]
        new = {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "MPLBACKEND": "agg",
        }
        if step.tuned or step.name == "tune":
            new["DYNAMIC_DINO_KERNELS_TUNED"] = str(self.tiles)
        if (commit := SITE / "COMMIT").exists():  # for provenance where there is no git
            new["DYNAMIC_DINO_COMMIT"] = commit.read_text().strip()
        return os.environ | new

    def command(self, step: Step, limit: float) -> list[str]:
        command = [*step.command, *shlex.split(self.options.further.get(step.name, ""))]
        workers = max(1, min(8, (os.cpu_count() or 1) // 2))
        values = {"{seconds}": str(int(0.7 * limit)), "{workers}": str(workers)}
        command = [values.get(part, part) for part in command]
        if step.name == "kernels" and workers > 1 and importlib.util.find_spec("xdist"):
            command += ["-n", str(workers)]
        if step.result:
            command += ["--json", str(self.part)]
        return [sys.executable, *command]

    @property
    def part(self) -> Path:
        return self.folder / "part.json"

    def execute(self, step: Step, limit: float) -> tuple[int | None, float, str]:
        """(exit status, None at the limit; seconds; output), which is in the log as well."""
        log = self.folder / "log.txt"
        command = self.command(step, limit)
        with log.open("ab") as file:
            file.write(f"\n==== {step.name}: {shlex.join(command)}\n".encode())
            file.flush()
            start, begin = file.tell(), time.monotonic()
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until it is known whom to end
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=self.environment(step),
                preexec_fn=as_a_group,
            )
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            try:
                status = self.process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            self.end_process()
            seconds = time.monotonic() - begin
        with log.open("rb") as file:
            file.seek(start)
            return status, seconds, file.read().decode(errors="replace")

    def end_process(self) -> None:
        """Ends what is left of the step's process group."""
        process, self.process = self.process, None
        if process is None:
            return
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
            try:
                os.killpg(process.pid, number)
                process.wait(patience)
            except ProcessLookupError:
                process.wait()
                return
            except subprocess.TimeoutExpired:
                continue

    def look_around(self) -> dict[str, str]:
        """Runs the step "imports" and opens the folder of this GPU. Returns what is missing.

        Raises:
            SystemExit: there is no GPU or no PyTorch, or they don't answer.
        """
        self.folder = self.out
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "log.txt").unlink(missing_ok=True)
        status, seconds, output = self.execute(IMPORTS, min(IMPORTS.limit, self.left()))
        if status != 0:
            print(output, end="")
            raise SystemExit(f"imports: {'no answer' if status is None else 'failed'}")
        *lines, found = output.splitlines()
        print("\n".join(lines))
        found = json.loads(found)
        self.machine = found["machine"]
        self.folder = self.out / found["gpu"]
        self.folder.mkdir(exist_ok=True)
        if self.options.resume:
            for path in (self.options.resume / found["gpu"]).glob("*"):
                if not (self.folder / path.name).exists():
                    shutil.copy(path, self.folder)
        with (self.folder / "log.txt").open("a") as file:
            file.write((self.out / "log.txt").read_text())
        (self.out / "log.txt").unlink()
        if self.state.exists():
            self.steps = json.loads(self.state.read_text())["steps"]
        print(f"{self.machine}: imports took {seconds:.0f} s; results go to {self.folder}/")
        return found["missing"]

    @property
    def state(self) -> Path:
        return self.folder / "steps.json"

    def write_state(self) -> None:
        text = json.dumps({"machine": self.machine, "steps": self.steps}, indent=1) + "\n"
        new = self.state.with_suffix(".new")
        new.write_text(text)
        new.replace(self.state)

    def run(self, step: Step, limit: float) -> None:
        """One step, its results and its fate."""
        print(f"== {step.name} (limit {limit:.0f} s)", flush=True)
        self.part.unlink(missing_ok=True)
        status, seconds, output = self.execute(step, limit)
        lines = [line for line in output.splitlines() if line.strip()]
        headline = lines[-1:]
        if self.part.exists():
            try:  # it may have been cut off while it wrote, and the next steps have a right to run
                report = json.loads(self.part.read_text())
                keep(report, self.folder / f"{step.result}.json")
                headline = HEADLINES[step.result](report)
            except (ValueError, LookupError, TypeError) as error:
                headline = [f"its results can't be read: {error!r}"]
                status = status or UNREADABLE
            self.part.unlink()
        if status != 0:
            print("\n".join(lines[-15:]))
        self.steps[step.name] = {
            "rc": status,
            "seconds": round(seconds, 1),
            "limit": round(limit, 1),
            "headline": headline,
        }
        self.write_state()
        print("\n".join(f"   {line}" for line in headline))

    def run_all(self, steps: list[Step], missing: dict[str, str]) -> None:
        waiting = [step for step in steps if self.steps.get(step.name, {}).get("rc") != 0]
        waiting.sort(key=lambda step: step.name in self.steps)  # first what was never tried
        waiting = [step for step in waiting if step.needs not in missing]
        while limits := plan(waiting, self.left() - GRACE):
            step = waiting.pop(0)
            if step.tuned and not self.tiles.exists():
                continue
            self.run(step, limits[step.name])


def keep(report: dict, path: Path) -> None:
    """Adds a step's report to the file. A row that was there gives way to the new one."""
    if path.exists():
        old = json.loads(path.read_text())
        rows = {case_of(row): row for row in [*old.get("rows", ()), *report.get("rows", ())]}
        commands = dict.fromkeys([*old["command"].split(" && "), report["command"]])
        report = old | report | {"command": " && ".join(commands)}
        if rows:
            report["rows"] = list(rows.values())
    path.write_text(json.dumps(report, indent=1) + "\n")


def case_of(row: dict) -> str:
    """What was measured, without how long it took."""
    return json.dumps([v for v in row.values() if not isinstance(v, (float, dict))])


# ---- in a few words -----------------------------------------------------------------------------


def of_fps(report: dict) -> list[str]:
    lines = []
    for row in report["rows"]:
        (first, dense), *others = row["results"].items()
        height, width = row["size"]
        ratios = ", ".join(
            f"{name.removeprefix('experts, ')} {r['fps'] / dense['fps']:.2f}" for name, r in others
        )
        lines.append(
            f"{height}x{width} {row['precision']} {row['mode']}: "
            f"{first} {dense['fps']:.1f} FPS; {ratios} of it"
        )
    if many := report.get("many_names"):
        whole = many["results"]["in one call"]["fps"]
        lines.append(f"{many['names']} names: {whole:.2f} images per second")
    return lines


def of_layer(report: dict) -> list[str]:
    lines = []
    for row in report["rows"]:
        dense = row["times"]["dense"]["median_us"]
        ratios = ", ".join(
            f"{name} {t['median_us'] / dense:.2f}"
            for name, t in row["times"].items()
            if name != "dense"
        )
        what = f"T={row['tokens']} {row['dtype']} {row['part']} {row['pass']}"
        lines.append(f"{what}: dense {dense:.1f} us; {ratios} of it")
    return lines


def of_training(report: dict) -> list[str]:
    return [
        f"{row['candidate']}: {row['median_ms']:.0f} ms, speed-up {row['speedup']:.2f}"
        for row in report["rows"]
    ]


def of_public_weights(report: dict) -> list[str]:
    return [
        f"{name}, {row['part']}, text {row['text']}: {row['fps']:.1f} FPS, "
        f"{row['speedup']:.2f} times transformers"
        for name, model in report["models"].items()
        for row in model["rows"]
        if row["library"] == "ours"
    ]


HEADLINES: dict[str, Callable[[dict], list[str]]] = {
    "fps": of_fps,
    "fps_tuned": of_fps,
    "moe_layer": of_layer,
    "training_step": of_training,
    "public_weights": of_public_weights,
}


def summary(run: Run, steps: list[Step], missing: dict[str, str]) -> tuple[list[str], int]:
    """A table of the steps, and the exit status."""
    lines, status = [], 0
    for step in steps:
        done = run.steps.get(step.name)
        if done is None and step.needs in missing:
            lines.append(f"{step.name:15}left out: {missing[step.needs]} is missing")
            status = 1
        elif done is None:
            why = "no tuned tiles" if step.tuned and not run.tiles.exists() else "no time"
            lines.append(f"{step.name:15}left out: {why}; a further call goes on here")
        else:
            fate = {0: "ok", None: "cut off"}.get(done["rc"], f"failed ({done['rc']})")
            status |= done["rc"] != 0
            first = (done["headline"] or [""])[0]
            lines.append(f"{step.name:15}{fate:11}{done['seconds']:6.0f} s  {first}")
            lines += [f"{'':36}{line}" for line in done["headline"][1:]]
    return lines, int(status)


# ---- the command --------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    names = [step.name for step in all_steps()]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seconds", type=float, default=600, help="for everything (default: %(default)s)")
    add("--out", type=Path, help="folder for results (default: $OUT, or gpu_results)")
    add("--resume", type=Path, metavar="FOLDER", help="results of an earlier call, to go on from")
    add("--only", nargs="+", choices=names, default=names, metavar="STEP", help=", ".join(names))
    add(
        "--with",
        dest="further",
        action="append",
        default=[],
        metavar="STEP=ARGUMENTS",
        help="further arguments of a step's command, which win over its own",
    )
    add("--imports", action="store_true", help="only say what is there and what is missing")
    options = parser.parse_args(arguments)
    options.out = options.out or Path(os.environ.get("OUT") or "gpu_results")
    if options.resume and not options.resume.is_dir():
        parser.error(f"--resume: there is no folder {options.resume}")
    further = dict(pair.partition("=")[::2] for pair in options.further)
    if unknown := set(further) - set(names):
        parser.error(f"--with: {', '.join(sorted(unknown))}: choose from {', '.join(names)}")
    options.further = further
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.imports:
        return report_imports()
    run = Run(options.out.resolve(), options)

    def stop(number: int, frame: object) -> None:
        run.end_process()
        sys.exit(128 + number)

    for number in STOPS:
        signal.signal(number, stop)
    missing = run.look_around()
    steps = [step for step in all_steps() if step.name in options.only]
    run.run_all(steps, missing)
    lines, status = summary(run, steps, missing)
    print("\n".join(["", run.machine, *lines]))
    return status


if __name__ == "__main__":
    sys.exit(main())
