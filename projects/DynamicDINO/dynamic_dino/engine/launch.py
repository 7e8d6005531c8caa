"""The command line of train_net.py, and the start of its processes."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from detectron2.engine import default_argument_parser
from detectron2.engine import launch as spawn
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from ..config import ConfigError
from ..console import program
from .placement import COMMANDS, Placement, placement_from_environment
from .preemption import EXIT_CODE, Preempted, passed_on_signals

logger = logging.getLogger(__name__)

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
  Slurm, from the login node, requeued when its time is over (extra: slurm)
    dynamic-dino slurm --nodes 2 --gpus 8 --time 24:00:00 --config-file CONFIG
  mpirun
    mpirun -n 16 -x MASTER_ADDR=HOST -x MASTER_PORT=29500 train_net.py --config-file CONFIG

SIGTERM, SIGINT, SIGUSR1, SIGUSR2 or SIGHUP: the iteration is finished, a checkpoint saved, and
the exit status is 75, "go on with --resume"; a second one, a second later or more, ends the run at
once.

A run writes to train.output_dir: config.yaml, log.txt, metrics.json, TensorBoard events,
model_*.pth, model_best.pth, results.json, evaluation/. That may be s3://bucket/run, or gs://, hf://:
it goes on from there on any machine (docs/scale.md).
"""


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
        "num_gpus": "GPUs of each machine; 0 trains on CPU (default: 1 where there is one; under "
        "torchrun, srun and mpirun, one for each process)",
        "dist_url": "where the processes meet (default: %(default)s)",
        "opts": "overrides of the recipe, key=value",
    }
    for action in parser._actions:
        action.help = help_texts.get(action.dest, action.help)
    return parser


def launch(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Calls ``main(args)`` in every process: in this one, if torchrun, Slurm or mpirun started it
    or one is enough, or in one process per GPU.

    Raises `ConfigError` where there are fewer GPUs than asked for, or the options and the launcher
    say different things.
    """
    placement = placement_from_environment(os.environ)
    if placement is None:
        start_processes(main, args)
    else:
        join_processes(main, args, placement)


def start_processes(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    available = torch.cuda.device_count()
    gpus = min(1, available) if args.num_gpus is None else args.num_gpus
    if gpus > available:
        raise ConfigError(
            f"{gpus} processes with one GPU each were asked for, but this machine has {available} "
            "GPUs; use fewer, or --num-gpus 0 for CPU (several CPU processes: torchrun)"
        )
    if args.num_machines > 1:
        if gpus == 0:
            raise ConfigError("several machines without GPUs: start the processes with torchrun")
        host = urlsplit(args.dist_url).hostname
        if args.dist_url == "auto" or host in ("127.0.0.1", "localhost"):
            raise ConfigError(
                f"--num-machines {args.num_machines} with --dist-url {args.dist_url}: they meet at "
                "the first one, --dist-url tcp://HOST:29500 with its name on each"
            )
    _tell_of_idle_gpus(args.num_gpus, gpus, available, "--num-gpus {}")
    if gpus == 0:
        args.opts = [*args.opts, "train.device=cpu"]
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


def join_processes(
    main: Callable[[argparse.Namespace], None], args: argparse.Namespace, placement: Placement
) -> None:
    available = torch.cuda.device_count()
    placement.check(args.num_gpus, args.num_machines)
    gpu = None
    if available if args.num_gpus is None else args.num_gpus:
        gpu = placement.gpu(available)
        torch.cuda.set_device(gpu)
        if placement.local_rank == 0 and available > 1:
            remedy = COMMANDS[placement.launcher]
            _tell_of_idle_gpus(args.num_gpus, placement.local_size, available, remedy)
    else:
        args.opts = [*args.opts, "train.device=cpu"]
    dist.init_process_group(
        "gloo" if gpu is None else "nccl",
        **meeting_point(placement, os.environ),
        rank=placement.rank,
        world_size=placement.world_size,
        timeout=DEFAULT_TIMEOUT,
    )
    check_peers(placement, gpu)
    comm.create_local_process_group(placement.local_size)
    main(args)
    dist.destroy_process_group()


def check_peers(placement: Placement, gpu: int | None) -> None:
    """Collective. Raises `ConfigError`, in all processes, for what none of them can see by itself:
    two have the same GPU, or a machine has more processes than another."""
    mine = None if gpu is None else str(torch.cuda.get_device_properties(gpu).uuid)
    told = comm.all_gather((placement.local_size, mine))
    sizes, gpus = ({*values} for values in zip(*told, strict=True))
    if len(sizes) > 1:
        raise ConfigError(f"machines have {sorted(sizes)} processes: start as many on each")
    if gpus != {None} and len(gpus) < len(told):
        twice = next(u for _, u in told if sum(u == other for _, other in told) > 1)
        ranks = [rank for rank, (_, uuid) in enumerate(told) if uuid == twice]
        raise ConfigError(
            f"processes {', '.join(map(str, ranks))} have the same GPU: give each one of its own "
            f"({COMMANDS[placement.launcher].format(placement.local_size)})"
        )


def _tell_of_idle_gpus(asked: int | None, used: int, available: int, remedy: str) -> None:
    if asked is None and 0 < used < available:
        logger.warning(
            "%d of the %d GPUs of this machine are used; for all of them: %s",
            used,
            available,
            remedy.format(available),
        )


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
