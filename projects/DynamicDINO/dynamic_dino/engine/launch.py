"""The command line of train_net.py, and the start of its processes.

Slurm's variables are read here, although `srun torchrun` would do: with one task a GPU, plain srun
needs no port, no number of nodes and no second launcher in the job script.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import default_argument_parser
from detectron2.engine import launch as spawn
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from ..config import ConfigError
from ..console import program
from .preemption import EXIT_CODE, Preempted, passed_on_signals

EXAMPLES = """
examples:
  the main recipe, Dynamic-DINO x16-Top2, on 8 GPUs
    %(prog)s --num-gpus 8
  the nano detector on CPU
    %(prog)s --config-file configs/pretrain/nano_stamps.py --num-gpus 0
  go on after an interruption, to the same numbers (with no checkpoint yet: start)
    %(prog)s --config-file CONFIG --resume
  evaluate weights, or the last checkpoint of a run
    %(prog)s --config-file CONFIG --eval-only train.init_checkpoint=model.pth
    %(prog)s --config-file CONFIG --eval-only --resume
  evaluate on a benchmark (configs/eval): the paper's model, or that of another recipe; interrupted
  and started again, it goes on where it stopped, unless weights, recipe, data or code have changed
    %(prog)s --eval-only --config-file configs/eval/coco.py train.init_checkpoint=model.pth
    %(prog)s --eval-only --config-file configs/eval/coco.py --model RECIPE
  a variant of a recipe, one of configs/variants.py; --variants shows them all
    %(prog)s --config-file configs/himoe/dino.py --variant x16_top1
    %(prog)s --variant himoe/dino:x16_top1
  change anything of the recipe; wrong names are reported with the nearest right one
    %(prog)s --config-file CONFIG train.output_dir=out optimizer.lr=2e-4 train.amp.enabled=true
  two machines (started once on each)
    %(prog)s --num-gpus 8 --num-machines 2 --machine-rank 0 --dist-url tcp://HOST:29500
    %(prog)s --num-gpus 8 --num-machines 2 --machine-rank 1 --dist-url tcp://HOST:29500
  torchrun; with --num-gpus 0, or no GPU, its processes train on CPU with gloo
    torchrun --nproc-per-node 8 train_net.py --config-file CONFIG
  the same, which goes on from the last checkpoint when a process dies, up to three times
    torchrun --standalone --nproc-per-node 8 --max-restarts 3 train_net.py --config-file CONFIG \\
        --resume
  64 images a step, 8 at once on a GPU: on 8 GPUs as it is, on 4 with train.accumulate=2, on 2 with
  4, on one with 8, and the run is that of 8 GPUs; twice that for 4 images at once
    %(prog)s --num-gpus 2 train.accumulate=4
  Slurm, one task a GPU
    srun --ntasks-per-node 8 --gpus-per-node 8 train_net.py --config-file CONFIG --resume

SIGTERM, SIGINT, SIGUSR1 or SIGHUP: the iteration is finished, a checkpoint saved, and the exit
status is 75, "go on with --resume"; a second one, a second later or more, ends the run at once.

A run writes to train.output_dir: config.yaml, log.txt, metrics.json, TensorBoard events,
model_*.pth, model_best.pth, results.json, evaluation/.
"""


@dataclass(frozen=True)
class Placement:
    """Where an already started process stands among its peers."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    url: str


def argument_parser(default_config: str | Path) -> argparse.ArgumentParser:
    """Detectron2's flags, with our defaults and examples."""
    parser = default_argument_parser(EXAMPLES)
    parser.prog = program() or parser.prog
    parser.formatter_class = partial(argparse.RawDescriptionHelpFormatter, width=100)
    parser.description = "Train or evaluate a detector by a LazyConfig recipe."
    parser.add_argument(
        "--model",
        metavar="RECIPE",
        help="with --eval-only: evaluate the model of this recipe, by default with the last "
        "weights of its run, on the test sets of --config-file; of a variant: RECIPE:NAME",
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="a variant of the recipe (NAME), or of another (himoe/dino:NAME); see --variants",
    )
    parser.add_argument(
        "--variants", action="store_true", help="print a table of all variants of recipes, and exit"
    )
    parser.set_defaults(config_file=os.path.relpath(default_config), num_gpus=None)
    help_texts = {
        "config_file": "the recipe (default: %(default)s)",
        "resume": "go on from the last checkpoint of train.output_dir, if there is one",
        "eval_only": "evaluate, don't train",
        "num_gpus": "GPUs of each machine; 0 trains on CPU (default: 1 where there is one)",
        "dist_url": "where the processes meet (default: %(default)s)",
        "opts": "overrides of the recipe, key=value",
    }
    for action in parser._actions:
        action.help = help_texts.get(action.dest, action.help)
    return parser


def launch(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Calls ``main(args)`` in every process: in this one, if torchrun or Slurm started it or one
    is enough, or in one process per GPU.

    Raises `ConfigError` where there are fewer GPUs than asked for.
    """
    available = torch.cuda.device_count()
    placement = placement_from_environment(os.environ)
    if placement is not None:
        gpus = placement.local_size if args.num_gpus != 0 and available else 0
    else:
        gpus = min(1, available) if args.num_gpus is None else args.num_gpus
    if gpus > available:
        raise ConfigError(
            f"{gpus} processes with one GPU each were asked for, but this machine has {available} "
            "GPUs; use fewer, or --num-gpus 0 for CPU (several CPU processes: torchrun)"
        )
    if gpus == 0:
        args.opts = [*args.opts, "train.device=cpu"]
    if placement is None:
        if gpus == 0 and args.num_machines > 1:
            raise ConfigError("several machines without GPUs: start the processes with torchrun")
        several = gpus * args.num_machines > 1
        try:
            with passed_on_signals() if several else nullcontext():
                spawn(
                    main,
                    gpus,
                    num_machines=args.num_machines,
                    machine_rank=args.machine_rank,
                    dist_url=args.dist_url,
                    args=(args,),
                )
        except ProcessExitedException as error:
            if error.exit_code != EXIT_CODE:
                raise
            raise Preempted from None
        return

    if gpus:
        torch.cuda.set_device(placement.local_rank)
    dist.init_process_group(
        "nccl" if gpus else "gloo",
        **meeting_point(placement, os.environ),
        rank=placement.rank,
        world_size=placement.world_size,
        timeout=DEFAULT_TIMEOUT,
    )
    comm.create_local_process_group(placement.local_size)
    main(args)
    dist.destroy_process_group()


def meeting_point(placement: Placement, env: Mapping[str, str]) -> dict[str, Any]:
    """Where the processes find each other: arguments of `init_process_group`.

    torchrun's processes meet in its own store, which outlives them: after a restart they would read
    where those that died could be reached (https://github.com/pytorch/pytorch/issues/135712). So
    every attempt has keys of its own there. On several machines, each counts the restarts
    that it has seen itself: there a new store for each attempt is needed, which is for torchrun to
    make.

    Raises `ConfigError` where torchrun wasn't told to.
    """
    if placement.url != "env://" or env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {"init_method": placement.url}
    restarts = int(env.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and placement.world_size > placement.local_size:
        raise ConfigError(
            f"torchrun --max-restarts {restarts} on several machines would fail at the first "
            "restart: processes would meet where those that died did; start torchrun on each "
            "machine with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
        )
    address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=DEFAULT_TIMEOUT)
    attempt = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": dist.PrefixStore(f"attempt{attempt}", store)}


def placement_from_environment(env: Mapping[str, str]) -> Placement | None:
    """Reads what torchrun, or else srun, tells its processes; None if neither started this one."""
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        world_size = int(env["WORLD_SIZE"])
        local_size = int(env.get("LOCAL_WORLD_SIZE", world_size))
        return Placement(int(env["RANK"]), world_size, int(env["LOCAL_RANK"]), local_size, "env://")
    # Set for the processes of a job step; in a batch script, SLURM_NTASKS and _PROCID are too.
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        world_size = int(env["SLURM_STEP_NUM_TASKS"])
        per_node = env["SLURM_STEP_TASKS_PER_NODE"]
        counts = [
            int(count)
            for part in per_node.split(",")
            for count in [re.match(r"\d+", part)[0]] * int((re.findall(r"x(\d+)", part) or [1])[0])
        ]
        if len(set(counts)) > 1:
            raise ConfigError(
                f"Slurm placed {per_node} tasks on its nodes; use the same number on each "
                "(--ntasks-per-node)"
            )
        host = env.get("MASTER_ADDR") or first_host(env["SLURM_STEP_NODELIST"])
        port = env.get("MASTER_PORT") or 20000 + int(env["SLURM_JOB_ID"]) % 20000
        return Placement(
            rank=int(env["SLURM_PROCID"]),
            world_size=world_size,
            local_rank=int(env["SLURM_LOCALID"]),
            local_size=counts[0],
            url=f"tcp://{host}:{port}",
        )
    return None


def first_host(nodelist: str) -> str:
    """The first host of Slurm's notation: ``"gpu[03-05,9],cpu1"`` -> ``"gpu03"``."""
    prefix, number, suffix = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodelist).groups()
    return prefix + (number or "") + (suffix or "")
