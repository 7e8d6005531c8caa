"""An interrupted run continues to the numbers of an uninterrupted one, bit for bit."""

import errno
import json
import logging
import os
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.utils.events import get_event_storage
from dynamic_dino import files
from dynamic_dino.config import ConfigError, load_config
from dynamic_dino.data.loader import build_train_loader
from dynamic_dino.engine import checkpointing, evaluate, train, trainer, writers
from dynamic_dino.engine.checkpointing import last_checkpoint
from dynamic_dino.engine.evaluate import do_test
from dynamic_dino.engine.preemption import EXIT_CODE, Preempted, noted_signals
from dynamic_dino.engine.setup import setup
from dynamic_dino.engine.train import do_train
from dynamic_dino.files import DiskFullError, LogFile
from helpers.processes import start_file
from helpers.tiny_recipe import sample

TRAIN_NET = Path(__file__).parents[2] / "projects/DynamicDINO/train_net.py"
RECIPE = Path(__file__).parents[1] / "helpers/tiny_recipe.py"


def same(a, b) -> bool:
    """Bitwise equality of nested state dicts."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def load(cfg, name: str = "model_final.pth") -> dict:
    return torch.load(Path(cfg.train.output_dir) / name, weights_only=True)


def with_momentum(cfg):
    """SGD with momentum under bf16 autocast, in place of AdamW in fp32."""
    cfg.optimizer._target_ = "torch.optim.SGD"
    del cfg.optimizer.betas
    cfg.optimizer.momentum, cfg.train.amp.enabled = 0.9, True
    return cfg


@pytest.mark.parametrize(
    ("stop_at", "change"),
    [(2, None), (4, None), (11, None), (19, None), (11, with_momentum)],
)
def test_interrupted_run_equals_whole_run(recipe, metrics, stop_at, change, request):
    if change:
        do_train(whole := change(recipe("whole")))
    else:
        whole, change = request.getfixturevalue("whole"), lambda cfg: cfg
    with pytest.raises(InterruptedError):
        do_train(change(recipe("cut", f"dataloader.train.stop_at={stop_at}")))
    assert max(metrics("cut")) == stop_at - 1
    do_train(change(recipe("cut")), resume=True)

    assert metrics("cut") == metrics("whole")
    assert sorted(metrics("whole")) == list(range(21))  # the last row is the final evaluation
    assert len({row["total_loss"] for row in metrics("whole").values() if "lr" in row}) == 20
    cut = load(recipe("cut"))
    assert same(cut, load(whole))
    assert cut["ema"]["updates"] == 20 and cut["iteration"] == 19


@pytest.mark.slow
def test_killed_run_equals_whole_run(recipe, metrics, tmp_path):
    """kill -9 while checkpoints are written after every iteration."""
    options = ["train.max_iter=60", "train.checkpointer.period=1"]
    do_train(recipe("whole", *options))
    more = [f"train.output_dir={tmp_path / 'cut'}", "dataloader.train.delay=0.05"]
    process = start_file(TRAIN_NET, "--config-file", RECIPE, "--num-gpus", "0", *options, *more)
    file = tmp_path / "cut/metrics.json"
    while not file.is_file() or file.read_text().count("\n") < 15:
        assert process.is_alive(), "the run ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    do_train(recipe("cut", *options), resume=True)
    assert metrics("cut") == metrics("whole")
    assert same(load(recipe("cut")), load(recipe("whole")))


@pytest.mark.parametrize(
    ("victim", "survivor"),
    [("model_0000011.pth", "model_0000009.pth"), ("last_checkpoint", "model_0000003.pth")],
)
def test_death_while_saving_leaves_a_good_checkpoint(
    recipe, metrics, whole, monkeypatch, victim, survivor
):
    written_whole = files.written_whole

    @contextmanager
    def dies(path, **options):
        with written_whole(path, **options) as file:
            yield file
            if path.name == victim and last_checkpoint(path.parent) is not None:
                raise KeyboardInterrupt  # the bytes are there, but not yet in their place

    for module in (files, checkpointing):
        monkeypatch.setattr(module, "written_whole", dies)
    with pytest.raises(KeyboardInterrupt):
        do_train(recipe("cut"))
    monkeypatch.undo()
    assert last_checkpoint(recipe("cut").train.output_dir).name == survivor
    do_train(recipe("cut"), resume=True)
    assert metrics("cut") == metrics("whole")
    assert same(load(recipe("cut")), load(whole))


def test_asked_to_end_it_goes_on_to_the_same_numbers(recipe, metrics, tmp_path):
    """By a signal: in iterations after which an evaluation is due, or a row of metrics, or neither,
    and in the last one."""
    options = ["train.log_period=3", "train.checkpointer.max_to_keep=9"]
    do_train(recipe("whole", *options))
    for iteration in (9, 11, 12, 19):
        with noted_signals(), pytest.raises(Preempted) as ended:
            do_train(recipe("cut", *options, f"dataloader.train.ask_at={iteration}"), resume=True)
        assert ended.value.code == EXIT_CODE
        assert load(recipe("cut"), last_checkpoint(tmp_path / "cut").name)["iteration"] == iteration
        assert not (tmp_path / "cut/results.json").is_file(), "of older weights"
    do_train(recipe("cut", *options), resume=True)
    assert metrics("cut") == metrics("whole")
    results = [
        json.loads((tmp_path / run / "results.json").read_text()) for run in ("cut", "whole")
    ]
    assert results[0] == results[1] and results[0]["iteration"] == 19
    assert same(load(recipe("cut")), load(recipe("whole")))
    cut, whole = (load(recipe(run), "model_best.pth") for run in ("cut", "whole"))
    assert all(same(cut[key], whole[key]) for key in ("model", "ema", "best", "iteration"))


def test_an_evaluation_that_was_killed_comes_first(recipe, metrics, whole, tmp_path, monkeypatch):
    def kill_at(wanted):
        def dies(*arguments, iteration, **options):
            if iteration == wanted:
                raise KeyboardInterrupt
            return do_test(*arguments, iteration=iteration, **options)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train, "do_test", dies)
            do_train(recipe("cut"), resume=True)

    for iteration in (4, 9, 9, 19):  # twice in the same one
        kill_at(iteration)
        assert max(metrics("cut")) == (19 if iteration == 19 else iteration - 1)
        assert not (tmp_path / "cut/results.json").is_file(), "of older weights"
    do_train(recipe("cut"), resume=True)
    assert metrics("cut") == metrics("whole")
    cut, whole = (load(recipe(run), "model_best.pth") for run in ("cut", "whole"))
    assert all(same(cut[key], whole[key]) for key in ("model", "ema", "best", "iteration"))
    results = [(tmp_path / run / "results.json").read_text() for run in ("cut", "whole")]
    assert results[0] == results[1]


def test_full_disk(recipe, metrics, whole, tmp_path, monkeypatch, caplog):
    save = torch.save

    def fails(name):
        def full(state, file):
            if name in file.name:
                file.write(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            save(state, file)

        monkeypatch.setattr(torch, "save", full)

    fails("model_best")
    do_train(recipe("best"))
    assert metrics("best") == metrics("whole") and "The run goes on" in caplog.text
    fails("model_0000011")
    with pytest.raises(DiskFullError) as error:
        do_train(recipe("cut"))
    assert all(
        word in str(error.value) for word in ("MB are free", "No space", "model_0000009.pth")
    )
    assert "\n" not in str(error.value) and "Traceback" not in caplog.text
    assert not list((tmp_path / "cut").glob("*.partial"))
    fails("model_final")
    with pytest.raises(DiskFullError):
        do_train(recipe("end"))
    monkeypatch.undo()
    for name in ("cut", "end"):
        do_train(recipe(name), resume=True)
        assert metrics(name) == metrics("whole")
        assert (tmp_path / name / "last_checkpoint").read_text() == "model_final.pth"
        final, same = (
            torch.load(tmp_path / run / "model_final.pth", weights_only=False)
            for run in (name, "whole")
        )
        assert final["iteration"] == same["iteration"]
        assert all(torch.equal(v, same["model"][k]) for k, v in final["model"].items())


def test_logs_outlive_a_full_disk(recipe, metrics, whole, tmp_path, monkeypatch, caplog):
    """Rows of metrics come when there is room again; without, no checkpoint is saved that they are
    missing from."""
    room_at: set[int] = set()

    class Late(LogFile):
        def flush(self):
            usual = self._file
            if get_event_storage().iter not in room_at:
                self._file = Path("/dev/full").open("wb", buffering=0)
            super().flush()
            self._file = usual

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writers, "LogFile", Late)
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    room_at.update((4, 9, 14, 19, 20))
    do_train(recipe("late", "train.checkpointer.period=5"))
    assert caplog.text.count("TensorBoard's events in") == 1
    assert metrics("late") == metrics("whole")
    assert same(load(recipe("late"))["model"], load(whole)["model"])
    room_at.clear()
    room_at.add(3)  # rows that come after the checkpoint of this iteration are left
    with pytest.raises(
        DiskFullError, match=r"metrics.json can't be .*model_0000004.pth: make room"
    ):
        do_train(recipe("cut"))
    monkeypatch.undo()
    do_train(recipe("cut"), resume=True)
    assert metrics("cut") == metrics("whole")

    def no_results(path, text):
        raise DiskFullError(f"{path} can't be written")

    monkeypatch.setattr(evaluate, "write_text", no_results)
    with pytest.raises(DiskFullError, match=r"results.json .*model_0000004.pth: make room"):
        do_train(recipe("scores"))
    monkeypatch.undo()
    do_train(recipe("scores"), resume=True)
    assert metrics("scores") == metrics("whole")


def test_bad_records_give_way_to_others(recipe, metrics, caplog, monkeypatch):
    """Counted, named once, as many as the recipe allows; a resumed run meets the same ones."""

    def numbered(count):
        return [{"index": i} for i in range(count)]

    class Mapper:
        def __call__(self, record, rng):
            if record["index"] in (5, 17, 40):
                raise ValueError(f"{record['index']}.png can't be read")
            return sample(record["index"])

    def run(folder, max_bad, records=64):
        cfg = recipe(folder)
        cfg.dataloader.train = L(build_train_loader)(
            dataset=L(numbered)(count=records),
            mapper=L(Mapper)(),
            total_batch_size=8,
            seed=3,
            filter_empty=False,
            max_bad=max_bad,
        )
        return do_train(cfg, resume=True)

    run("whole", 0.05)
    assert metrics("whole")[19]["bad_records"] == 3 and caplog.text.count("40.png can't be") == 1
    step = trainer.Trainer.run_step

    def killed(self):
        if self.iter == 9:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Trainer, "run_step", killed)
        run("cut", 0.05)
    caplog.clear()
    run("cut", 0.05)
    assert metrics("cut") == metrics("whole")
    assert "40.png" not in caplog.text, "it was said when it was met"
    with pytest.raises(ConfigError, match=r"3 bad records, more than .*max_bad.* of 64: .*17.png"):
        run("few", 0.04)
    with pytest.raises(ConfigError, match=r"png can't be read; mend .*--resume .*max_bad"):
        run("none", 0.0)
    run("few", 0.05, records=63)
    assert "had 64 records when this run was interrupted, and has 63" in caplog.text


def test_old_checkpoints_go_also_after_a_resume(recipe, tmp_path):
    with pytest.raises(InterruptedError):
        do_train(recipe("run", "dataloader.train.stop_at=9"))
    for name in ("model_0000015.pth", "model_0000019.pth"):  # it died before it pointed to them
        shutil.copy(last_checkpoint(tmp_path / "run"), tmp_path / "run" / name)
    do_train(recipe("run"), resume=True)
    names = sorted(file.name for file in (tmp_path / "run").glob("*.pth"))
    assert names == ["model_0000015.pth", "model_0000019.pth", "model_best.pth", "model_final.pth"]
    assert last_checkpoint(tmp_path / "run").name == "model_final.pth"


def test_best_checkpoint_outlives_a_resume(recipe, metrics):
    """With the sign turned round the first evaluation, at iteration 4, is the best."""
    worse = "dataloader.evaluator.val.sign=1"
    with pytest.raises(InterruptedError):
        do_train(recipe("run", worse, "dataloader.train.stop_at=12"))
    do_train(recipe("run", worse), resume=True)
    best = load(recipe("run"), "model_best.pth")
    scores = {i: row["val/AP"] for i, row in metrics("run").items() if "val/AP" in row}
    assert list(scores) == [4, 9, 14, 20] and max(scores.values()) == scores[4]
    assert best["iteration"] == 4 and best["best"] == {"val/AP": scores[4]}


def test_overrides_count_on_resume(recipe, metrics, whole):
    with pytest.raises(InterruptedError):
        do_train(recipe("run", "dataloader.train.stop_at=12"))
    do_train(recipe("run", "optimizer.lr=0.002"), resume=True)
    changed, rows = metrics("run"), metrics("whole")
    assert changed[11] == rows[11]
    assert changed[13]["lr"] == pytest.approx(rows[13]["lr"] / 10)


def test_used_folder_needs_resume(metrics, whole):
    with pytest.raises(ConfigError, match="already holds a run.*--resume"):
        do_train(whole)
    before = metrics("whole")
    do_train(whole, resume=True)
    assert metrics("whole") == before, "a complete run stays as it is"


def test_loss_scaling_resumes(recipe, metrics, monkeypatch):
    """float16 is for CUDA, but the scaler works on CPU too; an overflow halves the scale."""
    monkeypatch.setattr(trainer, "amp_dtype", lambda amp, device: torch.float16)
    options = ["train.amp.enabled=true", "optimizer.lr=0.001"]
    do_train(recipe("whole", *options))
    with pytest.raises(InterruptedError):
        do_train(recipe("cut", *options, "dataloader.train.stop_at=14"))
    do_train(recipe("cut", *options), resume=True)
    assert repr(metrics("cut")) == repr(metrics("whole"))  # NaN norms of skipped steps compare too
    scaler = load(recipe("whole"))["trainer"]["scaler"]
    assert scaler == load(recipe("cut"))["trainer"]["scaler"] and scaler["scale"] <= 2**16


def test_other_settings_are_said_once(tmp_path, monkeypatch, caplog):
    """What decides where, how fast or how often isn't; a recipe that moved says nothing."""
    monkeypatch.setattr("dynamic_dino.engine.setup.setup_logger", lambda *_, **__: None)
    logger = logging.getLogger("dynamic_dino")
    monkeypatch.setattr(logger, "propagate", True)
    custom = files.configs_folder() / "finetune/gdino_nano_custom.py"
    run = [f"train.output_dir={tmp_path}", "train.device=cpu"]

    def start(*overrides, resume=True):
        caplog.clear()
        setup(load_config(custom, [*run, *overrides]), resume)
        found = [r.getMessage() for r in caplog.records if "resumed with other" in r.getMessage()]
        return found[0] if found else ""

    assert not start("data.source=/a b"), "nothing to resume"
    (tmp_path / "model.pth").touch()
    (tmp_path / "last_checkpoint").write_text("model.pth")
    assert not start("data.source=/a b", "dataloader.train.num_workers=3", "train.log_period=7")
    assert not start("data.source=c, d", resume=False)
    said = start("data.train_json=e.json", "optimizer.lr=0.5")
    assert "data.source was 'c, d' and is 'data'" in said and " and is 0.5" in said
    assert "data.train_json was '${data.source}:train' and is 'e.json'" in said
    assert said.count(" was ") == 3
    assert not start("data.train_json=e.json", "optimizer.lr=0.5"), "once"
    (tmp_path / "config.yaml").write_text("model: {")
    assert not start()


def test_resume_refuses_what_does_not_fit(recipe, tmp_path):
    do_train(recipe("run", "train.ema.enabled=false"))
    with pytest.raises(ValueError, match="holds no 'ema' to resume"):
        do_train(recipe("run"), resume=True)
    with pytest.raises(ValueError, match="model_final.pth was written by another architecture"):
        do_train(recipe("run", "model.dim=9", "train.ema.enabled=false"), resume=True)

    final = tmp_path / "run/model_final.pth"
    final.unlink()
    with pytest.raises(ConfigError, match="names model_final.pth.*model_0000019.pth"):
        do_train(recipe("run"), resume=True)
    for other in ("../other/model_final.pth", "/etc/passwd", "", "a.pth\nb.pth"):
        (tmp_path / "run/last_checkpoint").write_text(other)
        with pytest.raises(ConfigError, match="should hold the name of a checkpoint in its folder"):
            do_train(recipe("run"), resume=True)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(recipe, metrics, whole, tmp_path, caplog):
    with pytest.raises(InterruptedError):
        do_train(recipe("cut", "dataloader.train.stop_at=16"))
    last = last_checkpoint(tmp_path / "cut")
    assert last.name == "model_0000015.pth"
    os.truncate(last, last.stat().st_size // 2)
    do_train(recipe("cut"), resume=True)
    assert "model_0000015.pth is corrupt or incomplete" in caplog.text
    assert "Going on from" in caplog.text and "model_0000014.pth instead" in caplog.text
    assert metrics("cut") == metrics("whole")
    assert same(load(recipe("cut")), load(whole))

    final = tmp_path / "cut/model_final.pth"
    content = bytearray(final.read_bytes())
    weight = load(recipe("cut"))["model"]["body.0.weight"].numpy().tobytes()
    content[content.index(weight) + 9] ^= 4
    final.write_bytes(content)
    caplog.clear()
    do_train(recipe("cut"), resume=True)
    assert "model_0000019.pth instead" in caplog.text
    for file in (tmp_path / "cut").glob("model_*.pth"):
        file.write_bytes(b"<html>")
    with pytest.raises(ConfigError, match="model_final.pth is a web page.*no older one"):
        do_train(recipe("cut"), resume=True)
