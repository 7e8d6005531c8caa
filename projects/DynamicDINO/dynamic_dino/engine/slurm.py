"""The command `dynamic-dino slurm`: submits a run to Slurm, which goes on until it is done.

submitit writes the job script, starts a task for each GPU and requeues the job. What this adds is
the moment: submitit would requeue where the signal finds the process, here the run has saved first.
"""

from __future__ import annotations

import argparse
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError, load_config
from ..console import command, program
from ..remote import RemoteError
from . import cli
from .output import local_folder
from .preemption import Preempted
from .train import find_run

SIGNAL = "SIGUSR2"  # submitit's own
PATIENCE = 60.0  # seconds in which a requeued job is ended
DURATION = re.compile(r"(?:(?P<d>\d+)-(?P<h>\d+)|(?P<H>\d+))(?::(?P<m>\d+))?(?::(?P<s>\d+))?")

EXAMPLES = """
examples:
  the paper's MoE-Tuning on two nodes of 8 GPUs, 24 hours at a time
    %(prog)s --nodes 2 --gpus 8 --time 24:00:00 --partition gpu
  another recipe, with overrides; what a site needs besides, as sbatch has it
    %(prog)s --gpus 4 --time 12:00:00 --sbatch account=vision --sbatch constraint=a100 \\
        --setup "module load cuda" --config-file CONFIG optimizer.lr=2e-4
  an evaluation
    %(prog)s --gpus 8 --time 2:00:00 --eval-only --config-file configs/eval/coco.py \\
        train.init_checkpoint=model.pth

All other arguments are those of train_net.py. The recipe is checked before the job is submitted.
Before its time is over (--warning), or when it is preempted with Slurm's PreemptParameters=
send_user_signal, the run saves, the job is requeued and goes on from there, to the same numbers.
scancel ends it for good, with a checkpoint. Where Slurm itself requeues it, after the failure of a
node, it goes on from its last checkpoint. Nodes need the same folders: this checkout or
installation, the data, train.output_dir, and the logs.
"""


@dataclass(frozen=True)
class Run:
    """What each task of the job calls.

    arguments  of train_net.py
    """

    arguments: tuple[str, ...]

    def __call__(self) -> None:
        try:
            cli.main(self.arguments)
        except Preempted as ended:
            if ended.signal == SIGNAL:
                signal.raise_signal(signal.SIGUSR2)  # submitit's turn: task 0 requeues the job
            if ended.signal in (SIGNAL, ""):
                time.sleep(PATIENCE)  # a task that ends may end the others, before task 0 is done
            raise

    def checkpoint(self) -> Any:
        """submitit's name for what a requeued job calls."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser()
    options, arguments = parser.parse_known_args(argv)
    _, args = cli.parse(arguments)
    if args.num_gpus not in (None, options.gpus) or args.num_machines != 1:
        parser.error("a job's GPUs and machines are --gpus (on each node) and --nodes")
    try:
        cfg = load_config(args.config_file, args.opts, args.model)
        if not args.eval_only:
            find_run(cfg.train.output_dir, args.resume)
            arguments = ["--resume", *arguments]
    except (ConfigError, RemoteError) as error:
        parser.error(str(error))
    if options.gpus == 0:
        arguments = ["--num-gpus", "0", *arguments]
    if options.cpus is None:
        options.cpus = 2 + cfg.dataloader.train.get("num_workers", 0)
    options.logs = options.logs or local_folder(cfg.train.output_dir) / "slurm"
    try:
        job = submit(Run(tuple(arguments)), options)
    except (ImportError, RuntimeError) as error:
        parser.error(str(error))
    print(f"job {job.job_id}, logs: {job.paths.stdout}")


def submit(run: Run, options: argparse.Namespace) -> Any:
    """Returns submitit's job.

    Raises:
        ImportError: submitit is not installed.
        RuntimeError: there is no Slurm here, or it refused the job.
    """
    try:
        from submitit import SlurmExecutor
    except ImportError:
        raise ImportError("submitit is missing: pip install 'dynamic-dino[slurm]'") from None
    executor = SlurmExecutor(options.logs, max_num_timeout=options.requeues)
    executor.update_parameters(
        job_name=options.name,
        time=options.time,
        nodes=options.nodes,
        ntasks_per_node=max(options.gpus, 1),
        cpus_per_task=options.cpus,
        gpus_per_node=options.gpus or None,
        partition=options.partition,
        signal_delay_s=options.warning,
        setup=options.setup,
        stderr_to_stdout=True,
        additional_parameters={"requeue": True, **dict(options.sbatch)},
    )
    return executor.submit(run)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program(),
        usage="%(prog)s [--nodes N] [--gpus N] --time TIME [options] [arguments of train_net.py]",
        description="Submit a training or an evaluation to Slurm.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nodes", type=int, default=1, help="default: %(default)s")
    add("--gpus", type=int, default=8, help="of each node; 0: its CPU (default: %(default)s)")
    add(
        "--time",
        type=minutes,
        required=True,
        help="limit of each turn, as sbatch has it: minutes, HH:MM:SS, D-HH:MM:SS",
    )
    add("--partition")
    add("--cpus", type=int, help="cores for each GPU (default: the loader's workers and two)")
    add("--name", default="dynamic-dino", help="of the job (default: %(default)s)")
    add(
        "--warning",
        type=int,
        default=120,
        metavar="SECONDS",
        help="before the limit: those of an iteration and a checkpoint (default: %(default)s)",
    )
    add(
        "--requeues",
        type=int,
        default=100,
        metavar="N",
        help="turns after the first that may end by the limit (default: %(default)s)",
    )
    add("--logs", type=Path, metavar="FOLDER", help="default: slurm/ in train.output_dir")
    add(
        "--sbatch",
        type=pair,
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="any other option of sbatch: account=vision, qos=high, mem=200G, ...",
    )
    add("--setup", action="append", metavar="COMMAND", help="in the job, before the run starts")
    return parser


def minutes(text: str) -> int:
    """Of a time as Slurm writes it: "90", "90:00", "1:30:00", "2-12", "2-0:30", "2-0:30:00"."""
    found = DURATION.fullmatch(text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no time of sbatch, such as 24:00:00")
    parts = {key: int(value or 0) for key, value in found.groupdict().items()}
    if found["d"] or found["s"]:
        hours, rest = parts["h"] + parts["H"], parts["m"] * 60 + parts["s"]
    else:  # minutes, and perhaps seconds
        hours, rest = 0, parts["H"] * 60 + parts["m"]
    return max((parts["d"] * 24 + hours) * 60 + -(-rest // 60), 1)


def pair(text: str) -> tuple[str, str | bool]:
    name, equals, value = text.removeprefix("--").partition("=")
    return name, value if equals else True
