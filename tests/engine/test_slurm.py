"""`dynamic-dino slurm` where sbatch and scontrol are scripts that say what they were asked for."""

import os
import signal
from pathlib import Path

import pytest
from dynamic_dino.engine import slurm
from dynamic_dino.engine.checkpointing import last_checkpoint
from dynamic_dino.engine.preemption import Preempted

RECIPE = Path(__file__).parents[1] / "helpers/tiny_recipe.py"
TASK = dict(SLURM_JOB_ID="7", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder where sbatch and scontrol leave the arguments that they were called with."""
    pytest.importorskip("submitit")
    for name in ("srun", "sbatch", "scontrol"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(
            f'#!/bin/sh\necho "$@" >> {tmp_path}/{name}\necho Submitted batch job 7\n'
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("OUT", str(tmp_path))
    return tmp_path


@pytest.fixture
def task(cluster, monkeypatch):
    """task() does what the job script of `cluster` does in its first task."""
    from submitit.core.submission import process_job

    numbers = (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]

    def run() -> None:
        with monkeypatch.context() as patch:
            for name, value in (TASK | dict(SUBMITIT_EXECUTOR="slurm")).items():
                patch.setenv(name, value)
            process_job(cluster / "run/slurm")

    yield run
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def submit(cluster, *flags: str, overrides: tuple[str, ...] = ()) -> None:
    recipe = ["--config-file", str(RECIPE), f"train.output_dir={cluster / 'run'}"]
    slurm.main(["--time", "1-12:30", *flags, *recipe, *overrides])


def warned(name: str) -> tuple[str, ...]:
    return "dataloader.train.ask_at=6", f"dataloader.train.ask_by={name}"


def test_a_job_that_is_warned_saves_is_requeued_and_goes_on(cluster, task, metrics, whole, capsys):
    submit(cluster, "--gpus", "0", overrides=warned("SIGUSR2"))
    assert "job 7, logs: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        task()
    assert (cluster / "scontrol").read_text() == "requeue 7\n"
    assert last_checkpoint(cluster / "run").name == "model_0000006.pth"
    task()
    assert metrics("run") == metrics("whole")
    assert (cluster / "scontrol").read_text() == "requeue 7\n", "once"


def test_scancel_ends_it_for_good(cluster, task):
    submit(cluster, "--gpus", "0", overrides=warned("SIGTERM"))
    with pytest.raises(Preempted):
        task()
    assert not (cluster / "scontrol").exists()
    assert last_checkpoint(cluster / "run").name == "model_0000006.pth"


def test_what_sbatch_is_asked_for(cluster):
    script = cluster / "run/slurm/7_submission.sh"
    submit(cluster, "--nodes", "2", "--gpus", "4", "--partition", "gpu", "--warning", "300")
    for option in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "partition=gpu", "time=2190"):
        assert f"#SBATCH --{option}\n" in script.read_text()
    for option in ("signal=USR2@300", "requeue", "open-mode=append"):
        assert f"#SBATCH --{option}\n" in script.read_text()
    others = ("--sbatch", "account=vision", "--sbatch", "exclusive")
    submit(cluster, *others, "--setup", "module load x")
    for line in ("#SBATCH --account=vision", "#SBATCH --exclusive", "module load x"):
        assert f"\n{line}\n" in script.read_text()


@pytest.mark.parametrize(
    ("flags", "overrides", "remedy"),
    [
        ([], ["optimizer.lrr=1"], "optimizer.lrr"),
        (["--num-gpus", "4"], [], "--gpus"),
        (["--num-machines", "2"], [], "--nodes"),
        (["--time", "soon"], [], "no time of sbatch, such as 24:00:00"),
    ],
)
def test_mistakes_are_told_before_the_job_waits(cluster, capsys, flags, overrides, remedy):
    with pytest.raises(SystemExit):
        submit(cluster, *flags, overrides=overrides)
    assert remedy in capsys.readouterr().err and not (cluster / "sbatch").exists()


def test_a_former_run_and_a_machine_without_slurm(cluster, whole, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        submit(cluster, overrides=[f"train.output_dir={whole.train.output_dir}"])
    assert "already holds a run" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit):
        submit(cluster)
    assert "srun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90:30", 91), ("1:30:00", 90), ("2-12", 3600), ("2-0:30", 2910), ("0:10", 1)]
    + [("1-00:00:01", 1441)],
)
def test_times_of_slurm(text, expected):
    assert slurm.minutes(text) == expected
