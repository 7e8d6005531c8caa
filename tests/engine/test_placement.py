"""What launchers tell their processes, and which GPU each then takes: its own, or an error."""

import argparse
import logging
import os
from types import SimpleNamespace

import pytest
from dynamic_dino.config import ConfigError
from dynamic_dino.engine import launch as launching
from dynamic_dino.engine.launch import check_peers, launch, meeting_point
from dynamic_dino.engine.placement import MPI, Placement, first_host, placement_from_environment
from helpers.seeds import examples
from hypothesis import given, settings
from hypothesis import strategies as st

TORCHRUN = dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4")
TORCHRUN |= dict(MASTER_ADDR="a", MASTER_PORT="1")


def srun(nodes: int, tasks: int, node: int = 0, task: int = 0, rank: int | None = None) -> dict:
    values = dict(
        SLURM_STEP_NUM_TASKS=nodes * tasks,
        SLURM_STEP_TASKS_PER_NODE=f"{tasks}(x{nodes})" if nodes > 1 else tasks,
        SLURM_STEP_NODELIST="gpu[07,11-12]",
        SLURM_PROCID=node * tasks + task if rank is None else rank,
        SLURM_NODEID=node,
        SLURM_LOCALID=task,
        SLURM_JOB_ID=20123,
    )
    return {name: str(value) for name, value in values.items()}


def mpirun(rank: int, size: int, local_rank: int, local_size: int, names=MPI[0]) -> dict:
    values = (rank, size, local_rank, local_size)
    return dict(zip(names, map(str, values), strict=True)) | dict(MASTER_ADDR="h", MASTER_PORT="9")


def test_torchrun():
    assert placement_from_environment(TORCHRUN) == Placement(5, 8, 1, 4, "env://")
    del (env := dict(TORCHRUN))["MASTER_PORT"]
    assert placement_from_environment(env) is None


def test_restarts_on_several_machines_need_torchruns_help():
    env = TORCHRUN | dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_MAX_RESTARTS="3")
    with pytest.raises(ConfigError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its env"):
        meeting_point(placement_from_environment(env), env)
    env["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    assert meeting_point(placement_from_environment(env), env) == {"init_method": "env://"}


def test_slurm():
    batch_script = dict(SLURM_NTASKS="16", SLURM_PROCID="0", SLURM_JOB_ID="20123")
    assert placement_from_environment(batch_script) is None
    step = srun(2, 8, node=1, task=1)
    found = placement_from_environment(step)
    assert found == Placement(9, 16, 1, 8, "tcp://gpu07:20123", "srun")
    step["MASTER_ADDR"], step["MASTER_PORT"] = "head", "123"
    assert placement_from_environment(step).url == "tcp://head:123"
    with pytest.raises(ConfigError, match="8,4.*--ntasks-per-node"):
        placement_from_environment(step | dict(SLURM_STEP_TASKS_PER_NODE="8,4"))


@settings(max_examples=examples(30), deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.booleans(), st.sampled_from((srun, *MPI)))
def test_ranks_of_a_machine_follow_each_other(nodes, tasks, cyclic, launcher):
    """Whatever the order in which the launcher counts; or it is refused."""
    if nodes * tasks == 1:
        return
    found, refused = [], 0
    for node in range(nodes):
        for task in range(tasks):
            counted = task * nodes + node if cyclic else node * tasks + task
            if launcher is srun:
                env = srun(nodes, tasks, node, task, counted)
            else:
                env = mpirun(counted, nodes * tasks, task, tasks, launcher)
            try:
                found.append(placement_from_environment(env).rank)
            except ConfigError as error:
                assert "--map-by slot" in str(error)
                refused += 1
    if cyclic and launcher is not srun and min(nodes, tasks) > 1:
        assert refused
    else:
        assert found == list(range(nodes * tasks))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("alpha", "alpha"),
        ("alpha,beta[1-2]", "alpha"),
        ("rack1-n[2]-ib", "rack1-n2-ib"),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


# What a process does, with as many GPUs as it sees -----------------------------------------------
@pytest.fixture
def start(monkeypatch):
    """start(environment, visible GPUs, options) -> what happened: how many processes were spawned,
    or the backend, rank and GPU with which this one joined."""

    def run(env: dict, visible: int, **options) -> dict:
        given = dict(num_gpus=None, num_machines=1, machine_rank=0, dist_url="tcp://127.0.0.1:1")
        args = argparse.Namespace(opts=[], **(given | options))
        done: dict = {}
        cuda = SimpleNamespace(
            device_count=lambda: visible, set_device=lambda gpu: done.update(gpu=gpu)
        )
        with monkeypatch.context() as patch:
            for name in [n for n in os.environ if n.startswith(("SLURM", "OMPI", "PMI"))]:
                patch.delenv(name)
            for name, value in env.items():
                patch.setenv(name, value)
            patch.setattr(launching.torch, "cuda", cuda)
            join = lambda backend, **where: done.update(backend=backend, rank=where["rank"])  # noqa: E731
            patch.setattr(launching.dist, "init_process_group", join)
            patch.setattr(launching.dist, "destroy_process_group", lambda: None)
            patch.setattr(launching.comm, "create_local_process_group", lambda size: None)
            patch.setattr(launching, "check_peers", lambda placement, gpu: None)
            patch.setattr(launching, "spawn", lambda main, gpus, **_: done.update(spawned=gpus))
            launch(lambda args: done.update(main=args.opts), args)
        return done

    return run


def joined(rank: int, gpu: int) -> dict:
    return dict(backend="nccl", rank=rank, gpu=gpu, main=[])


def test_each_process_takes_its_own_gpu(start):
    assert start(srun(8, 8, 1, 3), 8) == joined(11, 3)
    assert start(srun(8, 8, 1, 3), 1) == joined(11, 0), "--gpus-per-task=1"
    assert start(mpirun(3, 8, 3, 8), 8, num_gpus=8) == joined(3, 3)
    assert start(TORCHRUN, 4, num_gpus=4) == joined(5, 1)
    assert start(TORCHRUN, 0) == dict(backend="gloo", rank=5, main=["train.device=cpu"])
    assert start(srun(8, 8, 1, 3), 8, num_gpus=0)["backend"] == "gloo"
    assert start(srun(1, 1), 8, num_gpus=8) == dict(spawned=8), "one task that starts the others"
    assert start(mpirun(0, 1, 0, 1), 8, num_gpus=8) == dict(spawned=8)
    remote = dict(num_machines=2, dist_url="tcp://gpu07:29500")
    assert start({}, 8, num_gpus=8, **remote) == dict(spawned=8)


@pytest.mark.parametrize(
    ("env", "visible", "options", "remedy"),
    [
        (srun(8, 1), 8, dict(num_gpus=8), "srun --ntasks-per-node 8 --gpus-per-node 8"),
        (TORCHRUN, 8, dict(num_gpus=8), "torchrun --nproc-per-node 8"),
        (mpirun(3, 8, 3, 8), 4, dict(num_gpus=4), "mpirun with 4 processes on each"),
        (TORCHRUN, 1, {}, "this machine has 1 GPUs: torchrun --nproc-per-node 1"),
        (srun(2, 8), 4, {}, "this machine has 4 GPUs: srun --ntasks-per-node 4"),
        (TORCHRUN, 0, dict(num_gpus=4), "this machine has 0 GPUs.*--num-gpus 0"),
        (srun(2, 8), 8, dict(num_machines=4), "2 machines: leave out --num-machines"),
        ({k: v for k, v in mpirun(3, 8, 3, 8).items() if "MASTER" not in k}, 8, {}, "-x MASTER_AD"),
        ({k: v for k, v in mpirun(3, 8, 3, 8).items() if k != MPI[0][3]}, 8, {}, "with torchrun"),
        (TORCHRUN | dict(WORLD_SIZE="12", LOCAL_WORLD_SIZE="8"), 8, {}, "as many processes"),
        ({}, 8, dict(num_gpus=8, num_machines=2), "--dist-url tcp://HOST:29500"),
        ({}, 1, dict(num_gpus=2), "2 processes .* has 1 GPUs"),
        ({}, 0, dict(num_gpus=0, num_machines=2), "start the processes with torchrun"),
    ],
)
def test_what_would_go_wrong_is_refused_with_the_right_command(
    start, env, visible, options, remedy
):
    with pytest.raises(ConfigError, match=remedy):
        start(env, visible, **options)


def test_idle_gpus_are_told_of_once(start, caplog):
    with caplog.at_level(logging.WARNING):
        start({}, 8)
        start(srun(8, 1), 8)
        start(srun(8, 2, 1, 1), 8)
        start({}, 8, num_gpus=1)
        start(srun(8, 8), 1)
    assert [r.getMessage().partition("; ")[0] for r in caplog.records] == [
        "1 of the 8 GPUs of this machine are used"
    ] * 2
    assert "srun --ntasks-per-node 8" in caplog.text and "--num-gpus 8" in caplog.text


def test_peers_that_share_a_gpu_or_differ_in_number(monkeypatch):
    placement = Placement(0, 3, 0, 1, "tcp://h:1", "srun")
    uuid = SimpleNamespace(get_device_properties=lambda gpu: SimpleNamespace(uuid=f"GPU-{gpu}"))
    monkeypatch.setattr(launching.torch, "cuda", uuid)

    def check(*others, gpu=0):
        monkeypatch.setattr(launching.comm, "all_gather", lambda mine: [mine, *others])
        check_peers(placement, gpu)

    check((1, "GPU-1"), (1, "GPU-2"))
    check((1, None), (1, None), gpu=None)
    with pytest.raises(ConfigError, match="processes 0, 2 have the same GPU.*gpus-per-node 1"):
        check((1, "GPU-1"), (1, "GPU-0"))
    with pytest.raises(ConfigError, match=r"\[1, 2\] processes"):
        check((2, "GPU-1"), (2, "GPU-2"))
