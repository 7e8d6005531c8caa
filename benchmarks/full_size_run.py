#!/usr/bin/env python
"""A run on as many records as the paper's, two processes on CPU: started, killed, gone on with.

    python benchmarks/full_size_run.py --files FOLDER             # some 10 minutes, 3 GB there
    python benchmarks/full_size_run.py --files FOLDER --save      # kept in benchmarks/results/cpu/

Annotation files of the sizes of Dynamic-DINO's Table 7, in their formats, as `record_memory.py`
writes them; all records of a data set share a few drawn images. torchrun starts two processes with
loader's workers of their own, which train a nano detector with one decoder layer, so that the time
to the first iteration and the memory are those of the data, not of the model. Three starts:
  first    nothing is known of the files; all is killed at once after a checkpoint, as by a machine
           that is lost
  resumed  the same command again, to the end
  whole    the same run undisturbed, in another folder
At the end the weights of the last two are compared, bit by bit. The time includes torchrun's start
and the import of PyTorch in three processes, the CPU time is that of all of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from dynamic_dino.console import command
from dynamic_dino.data import datasets
from dynamic_dino.data.record_cache import VARIABLE
from lib.options import add_output, new_parser, place_output
from lib.provenance import provenance, write_json
from PIL import Image
from record_memory import IMAGES, SOURCES, image_name, memory, write_sources

ROOT = Path(__file__).parents[1]
RANKS, WORKERS, BATCH = 2, 2, 8
PERIOD, KILL_AT, ITERATIONS = 4, 6, 12
PATIENCE = 7200.0  # seconds, for the first start on a machine that others use, too
RECIPE = (
    ["--config-file", ROOT / "configs/pretrain/nano_drawn.py", "--num-gpus", "0", "--resume"],
    [
        "dataloader.train.dataset.names=[" + ",".join(SOURCES) + "]",
        "dataloader.train.mapper.dataset=[" + ",".join(SOURCES) + "]",
        f"dataloader.train.total_batch_size={BATCH}",
        f"dataloader.train.num_workers={WORKERS}",
        "dataloader.test=null",
        "train.best_metric=null",
        "train.eval_period=0",
        "train.log_period=1",
        f"train.checkpointer.period={PERIOD}",
        f"train.max_iter={ITERATIONS}",
        "model.decoder.num_layers=1",
    ],
)


def draw_images(root: Path) -> None:
    """The images that the records name, a few of each data set."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    content = image.resize((640, 480))
    for name in SOURCES:
        folder = datasets.locate_dataset(name, root=root).image_root
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(IMAGES):
            if not (file := folder / image_name(name, i)).exists():
                content.save(file, quality=80)


class Start:
    """A run under way in `output`, by torchrun."""

    def __init__(self, root: Path, output: Path) -> None:
        flags, overrides = RECIPE
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", RANKS]
        script = ROOT / "projects/DynamicDINO/train_net.py"
        words = [sys.executable, *torchrun, script, *flags, f"train.output_dir={output}"]
        environment = {"DETECTRON2_DATASETS": str(root), VARIABLE: str(root / "cache")}
        self.output, self.began = output, time.perf_counter()
        self.rows_before = self.rows()
        self.log = (output.parent / f"{output.name}.log").open("a")
        self.agent = subprocess.Popen(
            [*map(str, words), *overrides],
            env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def rows(self) -> list[dict]:
        file = self.output / "metrics.json"
        lines = file.read_text().splitlines() if file.exists() else []
        with suppress(json.JSONDecodeError):  # the last one may be half written
            return [json.loads(line) for line in lines]
        return [json.loads(line) for line in lines[:-1]]

    def new_rows(self) -> list[dict]:
        """Without those of the start before. Rows after its last checkpoint come once more, but
        their times are others."""
        return [row for row in self.rows() if row not in self.rows_before]

    def wait(self, until: Callable[[], bool]) -> float:
        """Seconds since the start. Raises SystemExit where the run ended before."""
        while not until():
            if time.perf_counter() - self.began > PATIENCE or self.agent.poll() is not None:
                self.kill()
                raise SystemExit(f"the run didn't get so far: see {self.log.name}")
            time.sleep(0.2)
        return time.perf_counter() - self.began

    def first_row(self) -> dict[str, float]:
        seconds = self.wait(lambda: bool(self.new_rows()))
        row = self.new_rows()[0]
        spent = [cpu_seconds(pid) for pid in (self.agent.pid, *descendants(self.agent.pid))]
        return {
            "iteration": row["iteration"],
            "first_iteration_seconds": round(seconds, 1),
            "cpu_seconds": round(sum(spent), 1),
        }

    def memory(self) -> dict[str, list[dict[str, int]]]:
        """Of the ranks and of all their workers, in bytes, once workers have worked."""
        ranks = children(self.agent.pid)
        workers = [pid for rank in ranks for pid in children(rank)]
        return {"ranks": [*map(memory, ranks)], "workers": [*map(memory, workers)]}

    def kill(self) -> None:
        """All of it at once, so that nobody finishes anything."""
        # torchrun's processes have sessions of their own
        processes = [self.agent.pid, *descendants(self.agent.pid)]
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.agent.wait()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    found = []
    with suppress(FileNotFoundError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    # not multiprocessing's tracker of resources, nor a compiler that is asked for its version
    return [child for child in found if is_trainer(child)]


def is_trainer(pid: int) -> bool:
    with suppress(FileNotFoundError):
        return b"train_net.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def descendants(pid: int) -> list[int]:
    return [each for child in children(pid) for each in (child, *descendants(child))]


def measure(root: Path, records: int) -> dict:
    writer = multiprocessing.Process(target=write_sources, args=(root, records))
    writer.start()
    writer.join()
    if writer.exitcode:
        raise SystemExit("the annotation files couldn't be written")
    draw_images(root)
    for leftover in ("cache", "runs"):
        shutil.rmtree(root / leftover, ignore_errors=True)
    (root / "runs").mkdir()
    starts = {}

    first = Start(root, root / "runs/killed")
    starts["first"] = first.first_row()
    first.wait(lambda: len(first.rows()) >= KILL_AT)
    starts["first"] |= first.memory()
    first.kill()
    for name, folder in (("resumed", "killed"), ("whole", "whole")):
        run = Start(root, root / "runs" / folder)
        starts[name] = run.first_row()
        run.wait(lambda run=run: run.rows()[-1]["iteration"] >= ITERATIONS - 3)
        starts[name] |= run.memory()
        if run.agent.wait(PATIENCE):
            raise SystemExit(f"the run failed: see {run.log.name}")
    killed, whole = (
        torch.load(root / "runs" / run / "model_final.pth", weights_only=True)["model"]
        for run in ("killed", "whole")
    )
    return {
        "records": records,
        "ranks": RANKS,
        "workers_of_a_rank": WORKERS,
        "cache_bytes": sum(f.stat().st_size for f in (root / "cache").rglob("*") if f.is_file()),
        "starts": starts,
        "tensors": len(whole),
        "equal_tensors": sum(torch.equal(killed[name], whole[name]) for name in whole),
    }


@command
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    report = provenance(("torch", "numpy")) | measure(options.files.resolve(), options.records)
    print(json.dumps(report, indent=1))
    if options.json:
        write_json(options.json, report)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--records", type=int, default=1_563_000, help="default: %(default)s")
    parser.add_argument(
        "--files",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="where the annotation files stay, to be used again, and the runs",
    )
    add_output(parser)
    options = parser.parse_args(arguments)
    place_output(options, "full_size_run")
    return options


if __name__ == "__main__":
    main()
