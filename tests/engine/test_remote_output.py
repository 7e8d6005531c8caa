"""Runs whose output folder is at an address: they go on, bit for bit, on a machine with an empty
disk, whatever became of the last one; and what became of faults of the storage."""

import json
import multiprocessing
import os
import shutil
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest
import torch
from detectron2.utils import comm
from dynamic_dino import remote
from dynamic_dino.config import ConfigError, load_config
from dynamic_dino.engine import cli, output
from dynamic_dino.engine.checkpointing import last_checkpoint
from dynamic_dino.engine.output import copied, local_folder
from dynamic_dino.engine.preemption import EXIT_CODE, Preempted, noted_signals
from dynamic_dino.engine.setup import setup
from dynamic_dino.engine.train import do_train
from dynamic_dino.files import writable_folder
from dynamic_dino.finetune.cli import main as finetune
from dynamic_dino.remote import RemoteError
from dynamic_dino.serving.inference import find_files
from helpers.ranks import run_ranks
from helpers.seeds import fresh_rng

RECIPE = Path(__file__).parents[1] / "helpers/tiny_recipe.py"
URL = "s3://bucket/run"
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine("b") -> the run's folder on the machine of that name, where we are from then on."""

    def move(name: str) -> Path:
        monkeypatch.setenv(remote.CACHE, str(tmp_path / "machines" / name))
        return local_folder(URL)

    monkeypatch.setattr(remote, "_FIRST", 0.01)
    move("a")
    return move


def run(*overrides: str, resume: bool = True):
    do_train(load_config(RECIPE, [f"train.output_dir={URL}", *overrides]), resume)


def rows(folder: Path) -> dict:
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    times = ("time", "data_time", "eta_seconds")
    return {row["iteration"]: {k: v for k, v in row.items() if k not in times} for row in lines}


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_equals(folder: Path, whole) -> None:
    whole = Path(whole.train.output_dir)
    assert rows(folder) == rows(whole)
    for name in ("model_final.pth", "model_best.pth"):
        mine, theirs = (torch.load(f / name, weights_only=True) for f in (folder, whole))
        assert same(mine["model"], theirs["model"]) and mine["iteration"] == theirs["iteration"]
    assert (folder / "results.json").read_text() == (whole / "results.json").read_text()


def at_address(s3) -> dict[str, bytes]:
    s3.invalidate_cache()
    return {name.removeprefix("bucket/run/"): s3.cat_file(name) for name in s3.find("bucket/run")}


@pytest.mark.slow
def test_goes_on_to_the_same_bits_on_new_machines(bucket, server, machine, whole):
    """Interrupted by an error, then by a signal; each ninth request is answered with 500."""
    server.fail_every = 9
    first = machine("a")
    with pytest.raises(InterruptedError):
        run("dataloader.train.stop_at=11")
    there = at_address(bucket)
    assert there["last_checkpoint"] == b"model_0000009.pth"
    assert {n for n in there if n.endswith(".pth")} == {
        *("model_0000007.pth", "model_0000009.pth", "model_best.pth")
    }, "those that the run has removed are gone there too"
    shutil.rmtree(first)
    second = machine("b")
    with noted_signals(), pytest.raises(Preempted) as ended:
        run("dataloader.train.ask_at=13")
    assert ended.value.code == EXIT_CODE
    assert at_address(bucket)["last_checkpoint"] == b"model_0000013.pth"
    assert not (second / "model_0000003.pth").exists()
    shutil.rmtree(second)
    third = machine("c")
    run()
    assert_equals(third, whole)
    there = at_address(bucket)
    here = {
        file.relative_to(third).as_posix(): file.read_bytes()
        for file in third.rglob("*")
        if file.is_file() and not file.name.startswith(".")
    }
    assert there == here, "nothing of the runs before it is left, nothing is missing"
    assert any(name.startswith("events.") for name in there)
    shutil.rmtree(third)
    run()
    assert_equals(third, whole)


@pytest.mark.slow
def test_killed_at_any_moment_of_a_copy(bucket, machine, whole, monkeypatch):
    """kill -9 before what is copied next, between a checkpoint and the pointer among others."""
    upload = output.upload

    def die_at(number: int | None, pointer: int | None) -> None:
        count = {"all": 0, "pointer": 0}

        def dies(content, url):
            count["all"] += 1
            count["pointer"] += url.endswith("/last_checkpoint")
            if number == count["all"] or pointer == count["pointer"]:
                os._exit(9)
            upload(content, url)

        monkeypatch.setattr(output, "upload", dies)
        run("dataloader.train.delay=0.02")

    moments = [(None, 2), *((int(n), None) for n in fresh_rng().integers(2, 20, 2))]
    for i, (number, pointer) in enumerate(moments):
        machine(f"killed{i}")
        process = FORK.Process(target=die_at, args=(number, pointer))
        process.start()
        process.join()
        assert process.exitcode == 9 or (process.exitcode == 0 and not pointer), "fewer copies"
        there = at_address(bucket)
        if "last_checkpoint" in there:
            assert there["last_checkpoint"].decode() in there
        if pointer:
            checkpoints = [n for n in there if n.startswith("model_0")]
            assert max(checkpoints) > there["last_checkpoint"].decode(), "it is there, unnamed"
        fresh = machine(f"fresh{i}")
        run()
        assert_equals(fresh, whole)
        bucket.rm("bucket/run", recursive=True)


def write(folder: Path, checkpoint: str, content: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / checkpoint).write_text(content)
    (folder / "metrics.json").write_text(content)
    (folder / "last_checkpoint").write_text(checkpoint)


def test_which_of_the_two_counts(tmp_path, monkeypatch, caplog):
    url = f"memory://{tmp_path.name}/run"

    def on(name: str) -> Path:
        monkeypatch.setenv(remote.CACHE, str(tmp_path / name))
        return local_folder(url)

    a = on("a")
    with copied(url, new=True):
        write(a, "model_1.pth", "one")
    write(a, "model_2.pth", "two")  # and died before it was copied
    with copied(url):
        assert last_checkpoint(a).read_text() == "two", "it is further than what is there"
    b = on("b")
    with copied(url):
        assert last_checkpoint(b).name == "model_2.pth"
        assert (b / "metrics.json").read_text() == "two" and (b / "model_1.pth").exists()
        write(b, "model_3.pth", "three")
        (b / "model_1.pth").unlink()
    on("a")
    write(a, "model_9.pth", "a's own, after b has taken over")
    (a / "evaluation/val").mkdir(parents=True)
    (a / "evaluation/val/results.json").write_text("stale")
    with copied(url):
        assert last_checkpoint(a).read_text() == "three" == (a / "metrics.json").read_text()
        assert sorted(p.name for p in a.glob("*.pth")) == ["model_2.pth", "model_3.pth"]
    assert "evaluation/val/results.json" not in remote.listing(url)

    # Two at once: the one that was there first copies nothing any more.
    with pytest.raises(RemoteError, match="another run has written .*one of the two must end"):
        with copied(url):
            write(a, "model_4.pth", "four")
            on("b")
            process_of_b = output._Copy(url, b)
            process_of_b.begin(False)
            write(b, "model_5.pth", "five")
            assert process_of_b.end() == ""
    assert remote.read(f"{url}/last_checkpoint", 0, 11) == b"model_5.pth"
    with pytest.raises(ConfigError, match=f"{url} already holds a run; .*--resume"):
        with copied(url, new=True):
            pass
    # Emptied, by a mistake perhaps: the only copy isn't removed, and not used unasked.
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}/run", recursive=True)
    with pytest.raises(ConfigError, match=f"{b} already holds a run; .*--resume"):
        with copied(url, new=True):
            pass
    with copied(url):
        pass
    assert {"model_5.pth", "last_checkpoint"} <= remote.listing(url).keys()


def test_names_that_leave_the_folder_stay_where_they_are(tmp_path, bucket, machine):
    for name in ("../../outside.pth", "a//b.pth"):
        bucket.pipe(f"bucket/run/{name}", b"content")
    bucket.pipe("bucket/run/model_1.pth", b"content")
    bucket.pipe("bucket/run/last_checkpoint", b"model_1.pth")
    assert remote.listing(URL).keys() == {"model_1.pth", "last_checkpoint"}


@pytest.mark.slow
def test_failures_are_warnings_and_at_the_end_an_error(bucket, machine, whole, monkeypatch, caplog):
    upload, broken = output.upload, set()

    def fails(content, url):
        if any(url.endswith(name) for name in broken):
            raise RemoteError(f"{url} can't be written (on purpose)")
        upload(content, url)

    def copy(self):  # at once, so that it is known which one fails
        newest = last_checkpoint(self.folder).name
        broken.clear()
        broken.update({"/model_0000007.pth"} if newest == "model_0000007.pth" else ())
        broken.update({"/last_checkpoint"} if newest == "model_final.pth" else ())
        self._asked = self._snapshot()
        self._work()

    folder = machine("a")
    with monkeypatch.context() as patch:
        patch.setattr(output, "upload", fails)
        patch.setattr(output._Copy, "ask", copy)
        with pytest.raises(RemoteError, match=f"are in {folder}.*--resume, or with `aws s3 sync"):
            run()
    assert "model_0000007.pth can't be written" in caplog.text
    assert "The run goes on, and the next checkpoint is copied" in caplog.text
    assert_equals(folder, whole)
    assert at_address(bucket)["last_checkpoint"] == b"model_0000015.pth", "of the last good copy"
    run()
    assert at_address(bucket)["last_checkpoint"] == b"model_final.pth"
    assert_equals(folder, whole)


def test_what_can_not_be_written_is_refused_at_once(bucket, machine, capsys):
    with pytest.raises(ConfigError, match="train.output_dir=https://.* use s3://, gs:// or hf://"):
        do_train(load_config(RECIPE, ["train.output_dir=https://example.org/run"]))
    with pytest.raises(ConfigError, match="s3://nobodys/run/running.json does not exist"):
        do_train(load_config(RECIPE, ["train.output_dir=s3://nobodys/run"]))
    with pytest.raises(OSError, match="can't write to s3:.*only train.output_dir"):
        writable_folder("s3://bucket/mine", "choose another with --output")
    with pytest.raises(SystemExit):
        finetune(["data", "--output", "s3://bucket/mine"])
    assert "train_net.py takes addresses" in capsys.readouterr().err


def test_the_command_refuses_evaluates_and_detects_at_the_address(bucket, machine, capsys):
    command = ["--num-gpus", "0", "--config-file", str(RECIPE), f"train.output_dir={URL}"]
    cli.main([*command, "train.max_iter=4", "train.eval_period=0"])
    scores = json.loads(at_address(bucket)["results.json"])
    machine("b")
    with pytest.raises(SystemExit):
        cli.main(command)
    assert f"{URL} already holds a run; continue it with --resume" in capsys.readouterr().err
    assert not list(local_folder(URL).glob("*.pth")), "nothing was fetched for that"
    bucket.rm("bucket/run/results.json")
    cli.main(["--eval-only", "--resume", *command])
    assert json.loads(at_address(bucket)["results.json"]) == scores

    config, weights = find_files(URL, None)
    assert f"output_dir: {URL}" in config.read_text()
    assert weights == f"{URL}/model_final.pth"
    with pytest.raises(FileNotFoundError, match="s3://bucket/none.* isn't the train.output_dir"):
        find_files("s3://bucket/none", None)


def train_on_two_machines(args) -> None:
    """A rank is a machine with a disk of its own, and in the end both are one."""

    def train(folder, *overrides, resume=False):
        cfg = load_config(RECIPE, [*args.opts, f"train.output_dir={folder}", *overrides])
        setup(cfg, resume)
        do_train(cfg, resume)

    def on(*name):
        comm.synchronize()
        os.environ[remote.CACHE] = str(args.output.joinpath(*map(str, name)))

    train(args.output / "whole")
    on("first", comm.get_rank())
    with suppress(InterruptedError):
        train(URL, "dataloader.train.stop_at=6")
    on("second", comm.get_rank())
    with noted_signals(), suppress(Preempted):
        train(URL, "dataloader.train.ask_at=10", resume=True)
    on("third")
    train(URL, resume=True)


@pytest.mark.slow
def test_machines_without_a_shared_disk(bucket, server, tmp_path, monkeypatch):
    server.asked.clear()
    run_ranks(train_on_two_machines, output=tmp_path)
    folders = {
        name: next((tmp_path / name / "runs").iterdir())
        for name in ("second/0", "second/1", "third")
    }
    assert rows(folders["third"]) == rows(tmp_path / "whole")
    finals = [torch.load(f / "model_final.pth") for f in (folders["third"], tmp_path / "whole")]
    assert same(finals[0]["model"], finals[1]["model"])
    fetched = [path.rpartition("/")[2] for method, path in server.asked if method == "GET"]
    assert fetched.count("model_0000004.pth") == 2, "the last of the first two machines"
    assert fetched.count("model_0000010.pth") == 1, "of a disk that both see"
    assert "model_best.pth" not in [path.name for path in folders["second/1"].iterdir()]
