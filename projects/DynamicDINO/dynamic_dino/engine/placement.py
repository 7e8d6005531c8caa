"""Where a process stands among those that torchrun, Slurm's srun or mpirun started, and its GPU.

Slurm's variables are read here, although `srun torchrun` would do: with one task a GPU, plain srun
needs no port, no number of nodes and no second launcher in the job script.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..config import ConfigError

# rank, number of processes, and both on this machine
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    + ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE")
    + ("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
)
COMMANDS = {
    "torchrun": "torchrun --nproc-per-node {0}",
    "srun": "srun --ntasks-per-node {0} --gpus-per-node {0}",
    "mpirun": "mpirun with {0} processes on each machine",
}


@dataclass(frozen=True)
class Placement:
    """Where an already started process stands among its peers. The ranks of a machine follow each
    other, and all machines have as many."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    url: str
    launcher: str = "torchrun"

    def check(self, gpus: int | None, machines: int) -> None:
        """Raises `ConfigError` where ``--num-gpus`` or ``--num-machines`` say something else than
        the launcher did."""
        started = f"{self.launcher} started {self.local_size} processes on each machine"
        if gpus and gpus != self.local_size:
            raise ConfigError(
                f"--num-gpus {gpus}, but {started}, each of which takes one GPU: "
                f"{COMMANDS[self.launcher].format(gpus)}, or leave out --num-gpus"
            )
        found = self.world_size // self.local_size
        if machines not in (1, found):
            raise ConfigError(
                f"--num-machines {machines}, but {started}, {self.world_size} in all, which are "
                f"{found} machines: leave out --num-machines and --machine-rank"
            )

    def gpu(self, visible: int) -> int:
        """Which of the `visible` GPUs this process takes: its own, where it sees no other (``srun
        --gpus-per-task 1``). Raises `ConfigError` where there are too few."""
        if visible >= self.local_size:
            return self.local_rank
        if visible == 1 and self.launcher != "torchrun":
            return 0
        raise ConfigError(
            f"{self.local_size} processes with one GPU each were asked for, but this machine has "
            f"{visible} GPUs: {COMMANDS[self.launcher].format(visible)}, or --num-gpus 0 for CPU"
        )


def placement_from_environment(env: Mapping[str, str]) -> Placement | None:
    """Reads what a launcher tells its processes; None if none started this one, or nothing else.

    An inner launcher comes before the one that it was started by: within a job, mpirun is.

    Raises:
        ConfigError: the processes wouldn't find each other, or machines have different numbers.
    """
    placement = _from_torchrun(env) or _from_mpirun(env) or _from_slurm(env)
    if placement is None:
        return None
    rank, size = placement.local_rank, placement.local_size
    if placement.world_size % size or placement.rank % size != rank:
        raise ConfigError(
            f"{placement.launcher} gave rank {placement.rank} of {placement.world_size} to process "
            f"{rank} of {size} of this machine: every machine must have as many processes, and "
            "their ranks follow each other (mpirun --map-by slot)"
        )
    return placement


def _from_torchrun(env: Mapping[str, str]) -> Placement | None:
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        return None
    world_size = int(env["WORLD_SIZE"])
    local_size = int(env.get("LOCAL_WORLD_SIZE", world_size))
    return Placement(int(env["RANK"]), world_size, int(env["LOCAL_RANK"]), local_size, "env://")


def _from_mpirun(env: Mapping[str, str]) -> Placement | None:
    names = next((names for names in MPI if {*names[:3]} <= env.keys()), None)
    if names is None or int(env[names[1]]) == 1:
        return None
    if not {"MASTER_ADDR", "MASTER_PORT", names[3]} <= env.keys():
        raise ConfigError(
            f"mpirun started {env[names[1]]} processes, which must be told where to meet: mpirun "
            "-x MASTER_ADDR=HOST -x MASTER_PORT=29500 (MPICH: -genv MASTER_ADDR HOST ...), HOST "
            "being the machine of rank 0; or start them with torchrun"
        )
    rank, world_size, local_rank, local_size = (int(env[name]) for name in names)
    url = f"tcp://{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    return Placement(rank, world_size, local_rank, local_size, url, "mpirun")


def _from_slurm(env: Mapping[str, str]) -> Placement | None:
    # Set for the processes of a job step; in a batch script, SLURM_NTASKS and _PROCID are too.
    world_size = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if world_size == 1:
        return None
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
    local_rank = int(env["SLURM_LOCALID"])
    return Placement(
        # not SLURM_PROCID, which goes round the nodes with --distribution=cyclic
        rank=int(env["SLURM_NODEID"]) * counts[0] + local_rank,
        world_size=world_size,
        local_rank=local_rank,
        local_size=counts[0],
        url=f"tcp://{host}:{port}",
        launcher="srun",
    )


def first_host(nodelist: str) -> str:
    """The first host of Slurm's notation: ``"gpu[03-05,9],cpu1"`` -> ``"gpu03"``."""
    prefix, number, suffix = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodelist).groups()
    return prefix + (number or "") + (suffix or "")
