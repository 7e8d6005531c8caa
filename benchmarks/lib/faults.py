"""What else happens to runs than kill -9: each fault is made, and what should be then is checked.

A fault is a function of the `Bench` with what should be in its docstring; it returns what was
otherwise, "" if nothing was. `FAULTS` has them by their names.
"""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import instantiate
from dynamic_dino import load_detector
from dynamic_dino.checkpoint.__main__ import main as checkpoint_command
from dynamic_dino.config import load_config
from dynamic_dino.data.images import load_image
from dynamic_dino.engine.checkpointing import last_checkpoint, read_checkpoint
from dynamic_dino.engine.preemption import EXIT_CODE
from dynamic_dino.files import configs_folder
from dynamic_dino.serving.inference import Detector
from dynamic_dino.serving.predict import main as predict_command
from PIL import Image

from lib.bad_inputs import FOREIGN, Runs
from lib.faulty_runs import LAST, RECIPES, Bench, End, _evaluated, rows, unlike

Fault = Callable[[Bench], str]
FAULTS: dict[str, Fault] = {}


def fault(name: str, *arguments: Any) -> Callable[[Callable[..., str]], Callable[..., str]]:
    def add(function: Callable[..., str]) -> Callable[..., str]:
        wanted = partial(function, *arguments) if arguments else function
        wanted.__doc__ = function.__doc__
        FAULTS[name] = wanted
        return function

    return add


# ---- signals ------------------------------------------------------------------------------------


def _preempted(
    bench: Bench, out: Path, number: int, when: Callable[[], bool], flags: Sequence[str] = ()
) -> str:
    process = bench.train(out, flags=flags or ("--resume",))
    if not bench.wait(process, when):
        return f"it ended before: {bench.end(process, out)}"
    os.kill(process.pid, number)
    end = bench.end(process, out)
    if end.status != EXIT_CODE or "Traceback" in end.said:
        return f"status {end.status}: {end.said.strip()[-300:]}"
    if last_checkpoint(out) is None:
        return "no checkpoint"
    return bench.resumed(out)


for _name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"):

    @fault(f"{_name} while training", getattr(signal, _name))
    def _signalled(number: int, bench: Bench) -> str:
        """Ends with status 75 and a checkpoint; resumed, the run equals an undisturbed one."""
        out = bench.fresh()
        return _preempted(bench, out, number, lambda: len(rows(out)) > 2)

    @fault(f"{_name} in an evaluation", getattr(signal, _name))
    def _signalled_there(number: int, bench: Bench) -> str:
        """Ends with status 75; resumed, the run equals an undisturbed one."""
        out = bench.fresh()
        return _preempted(bench, out, number, lambda: _evaluated(out) > 2)


# ---- damaged folders ----------------------------------------------------------------------------


def _flip(file: Path, share: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(len(content) * share)] ^= 16
    file.write_bytes(content)


def _pickled(file: Path) -> None:
    torch.save({"model": Runs(), "iteration": 3}, file)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut in half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "short of 100 bytes": lambda file: os.truncate(file, file.stat().st_size - 100),
    "with a flipped bit near its start": partial(_flip, share=0.1),
    "with a flipped bit in its middle": partial(_flip, share=0.5),
    "with a flipped bit near its end": partial(_flip, share=0.9),
    "that is pickled code": _pickled,
}
DAMAGES |= {
    f"that is {name}": partial(lambda content, file: file.write_bytes(content), content)
    for name, content in FOREIGN.items()
    if name in ("empty", "text", "HTML", "Git LFS", "zeros")
}

for _name, _damage in DAMAGES.items():

    @fault(f"last checkpoint {_name}", _damage)
    def _damaged(damage: Callable[[Path], Any], bench: Bench) -> str:
        """Resumes from the one before, and then equals an undisturbed run."""
        out = bench.half()
        damage(last_checkpoint(out))
        return bench.resumed(out)


@fault("last checkpoint deleted")
def _deleted(bench: Bench) -> str:
    """One line that names those that there are."""
    last_checkpoint(out := bench.half()).unlink()
    return bench.trained(out).one_line("model_0000007.pth")


@fault("all checkpoints damaged")
def _all_damaged(bench: Bench) -> str:
    """One line."""
    for file in (out := bench.half()).glob("model_*.pth"):
        os.truncate(file, 1000)
    return bench.trained(out).one_line("no older one")


@fault("best checkpoint damaged")
def _best_damaged(bench: Bench) -> str:
    """The run goes on to the same weights and metrics."""
    os.truncate((out := bench.half()) / "model_best.pth", 1000)
    return bench.resumed(out, but=("model_best.pth",))


for _content in ("../half/model_0000007.pth", "/etc/passwd", "", "\0\0\0\0"):

    @fault(f"last_checkpoint says {_content!r}", _content)
    def _elsewhere(content: str, bench: Bench) -> str:
        """One line; nothing of another folder is loaded."""
        ((out := bench.half()) / "last_checkpoint").write_text(content)
        return bench.trained(out).one_line("last_checkpoint")


@fault("metrics.json cut in a line")
def _metrics_cut(bench: Bench) -> str:
    """Resumed, the run equals an undisturbed one: the row is written again, if it was not saved."""
    out = bench.half()
    file = out / "metrics.json"
    with file.open("a") as metrics:
        metrics.write('{"iteration": 10, "loss')
    return bench.resumed(out)


@fault("a line of zeros in metrics.json")
def _metrics_zeros(bench: Bench) -> str:
    """Resumed, the run equals an undisturbed one."""
    out = bench.half()
    with (out / "metrics.json").open("a") as metrics:
        metrics.write("\0" * 500 + "\n")
    return bench.resumed(out)


@fault("running.json of a process that lives and isn't the run")
def _stale(bench: Bench) -> str:
    """The lock counts, not the note: resumed, the run equals an undisturbed one."""
    note = {"pid": os.getpid(), "host": os.uname().nodename, "since": "2025-01-01 00:00:00+00:00"}
    ((out := bench.half()) / "running.json").write_text(json.dumps(note))
    return bench.resumed(out)


@fault("half a file that a killed run left")
def _leftover(bench: Bench) -> str:
    """It is removed."""
    file = (out := bench.half()) / "model_0000019.pth.99-abc.partial"
    file.write_bytes(bytes(10**6))
    return bench.resumed(out) or ("it is still there" if file.exists() else "")


# ---- two runs -----------------------------------------------------------------------------------

for _name, _flags, _more in (
    ("another run", (), ["train.seed=1"]),
    ("the same run once more", ("--resume",), []),
    ("an evaluation", ("--eval-only", "--resume"), []),
):

    @fault(f"{_name} in the folder of one that runs", _flags, _more)
    def _second(flags: Sequence[str], more: list[str], bench: Bench) -> str:
        """The second ends with one line; the first equals an undisturbed one."""
        out, other = bench.fresh(), bench.folder / "second"
        first = bench.train(out)
        bench.wait(first, lambda: len(rows(out)) > 1)
        file, overrides = RECIPES["dense"]
        command = ["--config-file", str(configs_folder() / file), "--num-gpus", "0", *flags]
        command += [*overrides, f"train.output_dir={out}", *more]
        end = bench.do(other, lambda: bench_cli(command))
        said = end.one_line(str(first.pid))
        whole = bench.end(first, out)
        return said or (f"the first: {whole}" if whole.status else unlike(out, bench.whole()))


def bench_cli(command: list[str]) -> None:
    from dynamic_dino.engine import cli

    cli.main(command)


# ---- disks --------------------------------------------------------------------------------------


def full_disk(name: str) -> Callable[[], None]:
    """In this process the disk is full for files whose names have `name` in them."""

    def begin() -> None:
        save = torch.save

        def fails(state: Any, file: Any, *arguments: Any) -> None:
            if name in str(getattr(file, "name", file)):
                file.write(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            save(state, file, *arguments)

        torch.save = fails

    return begin


def small_files(size: int) -> Callable[[], None]:
    """In this process no file can get larger, which the system sees to."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@fault("disk full at a checkpoint", full_disk("model_0000007"), "No space")
@fault("disk full at the last checkpoint", full_disk("model_final"), "No space")
@fault("the system takes no more of a checkpoint", small_files(10**6), "model_0000003")
def _no_room(begin: Callable[[], None], word: str, bench: Bench) -> str:
    """One line with the last good checkpoint; no half file; resumed, an undisturbed run's equal."""
    out = bench.fresh()
    said = bench.trained(out, before=begin).one_line(word, "last good checkpoint")
    left = [file.name for file in out.glob("*.partial")]
    return said or (f"{left} were left" if left else bench.resumed(out))


@fault("disk full at the best checkpoint")
def _no_room_for_best(bench: Bench) -> str:
    """The run goes on to the same weights and metrics."""
    out = bench.fresh()
    end = bench.trained(out, before=full_disk("model_best"))
    if end.status or "Traceback" in end.said:
        return f"status {end.status}: {end.said.strip()[-300:]}"
    return unlike(out, bench.whole(), ("model_best.pth",))


@fault("disk full at metrics.json", "metrics.json")
@fault("disk full at log.txt", "log.txt")
def _no_room_for_text(name: str, bench: Bench) -> str:
    """The run ends with one line, or goes on; resumed when there is room, it equals an undisturbed
    one."""
    out = bench.half()
    file = out / name
    before = file.read_bytes()
    file.unlink()
    file.symlink_to("/dev/full")  # where every write fails so
    end = bench.trained(out)
    said = end.one_line() if end.status else "Traceback" in end.said and end.said.strip()[-300:]
    if file.is_symlink():
        file.unlink()
        file.write_bytes(before)
    return said or bench.resumed(out)


@fault("output folder that can't be made", "/proc/none/run")
@fault("output folder that is a file", "/dev/null")
def _no_folder(out: str, bench: Bench) -> str:
    """One line with the option."""
    return bench.trained(bench.fresh(), f"train.output_dir={out}").one_line("train.output_dir")


# ---- data ---------------------------------------------------------------------------------------

BAD_IMAGES: dict[str, Callable[[Path], Any]] = {
    "deleted": lambda file: file.unlink(),
    "cut in half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "a web page": lambda file: file.write_bytes(FOREIGN["HTML"]),
    "of PostScript": lambda file: file.write_bytes(_postscript()),
}


def _postscript() -> bytes:
    Image.new("RGB", (30, 20)).save(file := io.BytesIO(), "EPS")
    return file.getvalue()


class _Changed:
    """Some training images are bad meanwhile."""

    def __init__(self, bench: Bench, change: Callable[[Path], Any], count: int) -> None:
        self.files = sorted((bench.data / "drawn/train").glob("*.png"))[:count]
        self.change = change

    def __enter__(self) -> Sequence[Path]:
        self.before = [file.read_bytes() for file in self.files]
        for file in self.files:
            self.change(file)
        return self.files

    def __exit__(self, *error: object) -> None:
        for file, content in zip(self.files, self.before, strict=True):
            file.write_bytes(content)


for _name, _change in BAD_IMAGES.items():

    @fault(f"a training image {_name}", _change)
    def _bad_image(change: Callable[[Path], Any], bench: Bench) -> str:
        """One line that names it; repaired and resumed, the run equals an undisturbed one."""
        out = bench.half()
        with _Changed(bench, change, 16) as files:  # all, so that one is met at once
            said = bench.trained(out).one_line(f"{files[0].parent}/0000")
        return said or bench.resumed(out)


@fault("bad training images that max_bad allows, and a kill")
def _allowed(bench: Bench) -> str:
    """They are counted; killed and resumed, it equals the run that wasn't killed."""
    more = ("dataloader.train.max_bad=0.3",)
    whole, out = bench.fresh("whole, of bad images"), bench.fresh()
    with _Changed(bench, BAD_IMAGES["a web page"], 3):
        end = bench.trained(whole, *more)
        if end.status or not any(row.get("bad_records", 0) > 0 for row in rows(whole)):
            return f"status {end.status}, none counted: {end.said.strip()[-300:]}"
        process = bench.train(out, *more)
        bench.wait(process, lambda: len(rows(out)) > 4)
        process.kill()
        bench.end(process, out)
        end = bench.trained(out, *more)
    return f"status {end.status}" if end.status else unlike(out, whole)


@fault("a record taken out between start and resume")
def _fewer_records(bench: Bench) -> str:
    """A warning says that the order is another one."""
    out, file = bench.half(), bench.data / "drawn/annotations/train.json"
    before = file.read_text()
    content = json.loads(before)
    first = content["images"].pop(0)["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != first]
    file.write_text(json.dumps(content))
    try:
        end = bench.trained(out)
    finally:
        file.write_text(before)
    return "" if end.status == 0 and "had 16 records" in end.said else end.said.strip()[-300:]


@fault("a worker of the loader killed")
def _worker_killed(bench: Bench) -> str:
    """The run ends with one line; resumed, it equals an undisturbed one."""
    out = bench.fresh()
    process = bench.train(out, "dataloader.train.num_workers=1")
    bench.wait(process, lambda: len(rows(out)) > 3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    said = bench.end(process, out).one_line()
    return said or bench.resumed(out)


@fault("a learning rate at which the loss diverges")
def _diverged(bench: Bench) -> str:
    """An error, without a traceback, that names the images of the batch; the checkpoints stay."""
    more = ("optimizer.lr=1e6", "train.clip_grad.enabled=false", "train.checkpointer.period=1")
    end = bench.trained(bench.fresh(), *more)
    clear = end.status == 1 and "infinite or NaN" in end.said and ".png" in end.said
    return "" if clear and "Traceback" not in end.said else f"{end.status}: {end.said[-300:]}"


@fault("the same run twice", ())
@fault("the same run with two workers", ("dataloader.train.num_workers=2",))
def _again(more: Sequence[str], bench: Bench) -> str:
    """Bit for bit the same."""
    end = bench.trained(out := bench.fresh(), *more)
    return f"status {end.status}" if end.status else unlike(out, bench.whole())


# ---- evaluations --------------------------------------------------------------------------------


def _lines(change: Callable[[list[bytes]], Any]) -> Callable[[Path], None]:
    def edit(log: Path) -> None:
        with log.open("rb") as file:
            lines = list(file)
        log.write_bytes(b"".join(change(lines) or lines))

    return edit


def _in_line(lines: list[bytes], number: int, at: int) -> None:
    line = bytearray(lines[number])
    line[at] ^= 1
    lines[number] = bytes(line)


LOGS: dict[str, Callable[[Path], Any]] = {
    "undamaged": lambda log: None,
    "cut in its last line": lambda log: os.truncate(log, log.stat().st_size - 7),
    "cut in its first line": lambda log: os.truncate(log, 20),
    "emptied": lambda log: os.truncate(log, 0),
    "with a line twice": _lines(lambda lines: [*lines, lines[2]]),
    "without a line": _lines(lambda lines: lines.pop(2) and None),
    "with a flipped bit in a line": _lines(lambda lines: _in_line(lines, 2, -30)),
    "with a flipped bit in its first line": _lines(lambda lines: _in_line(lines, 0, -9)),
    "with a flipped bit in a checksum": _lines(lambda lines: _in_line(lines, 1, 3)),
    "with zeros behind": lambda log: log.write_bytes(log.read_bytes() + bytes(300)),
    "with a list for its first line": _lines(lambda lines: [b"[1, 2]\n", *lines[1:]]),
    "with words between": _lines(lambda lines: lines.insert(2, b"hello world\n")),
    "that is a web page": lambda log: log.write_bytes(FOREIGN["HTML"]),
}

for _name, _damage in LOGS.items():

    @fault(f"killed evaluation, its log {_name}", _damage)
    def _log_damaged(damage: Callable[[Path], Any], bench: Bench) -> str:
        """Started again, it has exactly the scores of an undisturbed one."""
        source, weights = bench.folder / "evaluated", bench.whole() / "model_final.pth"
        command = {"flags": ("--eval-only",)}
        options = [f"train.init_checkpoint={weights}"]
        if not source.is_dir():
            end = bench.trained(bench.fresh("evaluated whole"), *options, **command)
            if end.status:
                return end.said[-300:]
            process = bench.train(source, *options, **command)
            bench.wait(process, lambda: _evaluated(source) > 3)
            process.kill()
            bench.end(process, source)
        out = bench.copy(source)
        [log] = out.glob("evaluation/val/unfinished/*.log")
        damage(log)
        end = bench.trained(out, *options, **command)
        if end.status or "Traceback" in end.said:
            return f"status {end.status}: {end.said.strip()[-300:]}"
        wanted = json.loads((bench.folder / "evaluated whole/results.json").read_text())
        return "" if json.loads((out / "results.json").read_text()) == wanted else "other scores"


# ---- what must not be run -----------------------------------------------------------------------

for _text in (
    "model: {_target_: os.system, command: touch MADE}\ndataloader: {}\n",
    "model: !!python/object/apply:os.system ['touch MADE']\ndataloader: {}\n",
    "model: {_target_: torch.hub.load, repo_or_dir: MADE}\ndataloader: {}\n",
):

    @fault(f"config.yaml: {_text.split('dataloader')[0].strip()}", _text)
    def _config_code(text: str, bench: Bench) -> str:
        """One line; nothing of it is run."""
        out, made = bench.fresh(), bench.folder / "made"
        config = bench.folder / "evil.yaml"
        config.write_text(text.replace("MADE", str(made)))
        command = ["--config-file", str(config), "--num-gpus", "0", f"train.output_dir={out}"]
        said = bench.do(out, lambda: bench_cli(command)).one_line("not trusted")
        return "it ran" if made.exists() else said


@fault("PostScript named .jpg, where Ghostscript is installed")
def _ghostscript(bench: Bench) -> str:
    """One line; Ghostscript isn't started."""
    out, made = bench.fresh(), bench.folder / "made by gs"
    folder = bench.folder / "bin"
    folder.mkdir(exist_ok=True)
    (folder / "gs").write_text(f"#!/bin/sh\ntouch '{made}'\n")
    (folder / "gs").chmod(0o755)
    file = bench.folder / "photo.jpg"
    file.write_bytes(_postscript())

    def look() -> None:
        os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
        _shown_as_one_line(lambda: load_image(file))

    return "it ran" if made.exists() else bench.do(out, look).one_line("photo.jpg")


def _shown_as_one_line(work: Callable[[], Any]) -> None:
    """As the commands show what they raise."""
    try:
        work()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _hub(name: str, files: dict[str, Any]) -> None:
    @fault(f"hf: directory {name}")
    def load(bench: Bench) -> str:
        """One line; nothing of it is run, nothing outside of it is read."""
        out, made = bench.fresh(), bench.folder / "made by a model"
        folder = bench.fresh("model")
        folder.mkdir()
        for file, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / file).write_text(text.replace("MADE", str(made)))
        work = partial(load_detector, f"hf:{folder}")
        end = bench.do(out, lambda: _shown_as_one_line(work))
        return "it ran" if made.exists() else end.one_line()


_CODE = "open('MADE', 'w')\n"
_AUTO = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoTokenizer": "code.Tokenizer"}
_hub("with code", {"config.json": {"model_type": "mine", "auto_map": _AUTO}, "code.py": _CODE})
_hub(
    "with code and a type that is known",
    {"config.json": {"model_type": "grounding-dino", "auto_map": _AUTO}, "code.py": _CODE},
)
_hub("without a config", {"model.safetensors": "x"})
_hub("whose config is nested 100,000 times", {"config.json": "[" * 10**5})
_hub("whose config is a list", {"config.json": "[]"})
_hub(
    "whose index names /etc/passwd",
    {
        "config.json": {"model_type": "grounding-dino"},
        "model.safetensors.index.json": {"weight_map": {"a": "/etc/passwd", "b": "../x"}},
    },
)
_hub(
    "whose weights are a pointer of Git LFS",
    {
        "config.json": {"model_type": "grounding-dino"},
        "model.safetensors": FOREIGN["Git LFS"].decode(),
    },
)


# ---- predict, export, threads -------------------------------------------------------------------


def _predict(bench: Bench, out: Path, images: Sequence[Path], *more: str) -> list[str]:
    whole = bench.whole()
    options = ["--config-file", str(whole / "config.yaml"), "--device", "cpu"]
    options += ["--weights", str(whole / "model_final.pth"), "--threshold", "0"]
    return [*map(str, images), *options, "--output", str(out), *(more or ("--text", "red circle."))]


def _photos(bench: Bench, count: int) -> list[Path]:
    drawn = sorted((bench.data / "drawn/train").glob("*.png"))
    folder = bench.fresh("photos")
    folder.mkdir()
    names = [folder / f"{i:03d}.png" for i in range(count)]
    for i, name in enumerate(names):
        shutil.copy(drawn[i % len(drawn)], name)
    return names


def _entries(out: Path) -> int:
    return len(json.loads((out / "predictions.json").read_text()))


@fault("predict: bad ones among ten images")
def _predict_bad(bench: Bench) -> str:
    """Status 2; the others are done."""
    out, files = bench.fresh(), _photos(bench, 10)
    for file, change in zip(files[1::2], BAD_IMAGES.values(), strict=False):
        if change is not BAD_IMAGES["deleted"]:
            change(file)
    end = bench.do(out, lambda: predict_command(_predict(bench, out, files)))
    if end.status != 2 or "Traceback" in end.said or end.said.count("error:") != 3:
        return f"status {end.status}: {end.said.strip()[-300:]}"
    return "" if _entries(out) == 7 else f"{_entries(out)} of 7"


@fault("predict: a phrase of 600 words for the third of four images")
def _predict_long(bench: Bench) -> str:
    """Status 2 and one line; the others are done."""
    out, files = bench.fresh(), _photos(bench, 4)
    texts = ["red circle.", "red circle.", "word " * 600, "red circle."]
    more = [part for text in texts for part in ("--text", text)]
    end = bench.do(out, lambda: predict_command(_predict(bench, out, files, *more)))
    if end.status != 2 or "Traceback" in end.said or end.said.count("error:") != 1:
        return f"status {end.status}: {end.said.strip()[-300:]}"
    return "" if _entries(out) == 3 else f"{_entries(out)} of 3"


for _name in ("SIGTERM", "SIGINT"):

    @fault(f"predict: {_name}", getattr(signal, _name))
    def _predict_signal(number: int, bench: Bench) -> str:
        """One line; what was found before is in predictions.json."""
        out, files = bench.fresh(), _photos(bench, 300)
        process = bench.start(out, lambda: predict_command(_predict(bench, out, files)))
        lines = out / "predictions.jsonl"
        bench.wait(process, lambda: lines.exists() and lines.read_bytes().count(b"\n") > 5)
        os.kill(process.pid, number)
        end = bench.end(process, out)
        return end.one_line() or ("" if 5 < _entries(out) < 300 else f"{_entries(out)} entries")


@fault("predict: kill -9")
def _predict_kill(bench: Bench) -> str:
    """What was found before is in predictions.jsonl, whole lines."""
    out, files = bench.fresh(), _photos(bench, 300)
    process = bench.start(out, lambda: predict_command(_predict(bench, out, files)))
    lines = out / "predictions.jsonl"
    bench.wait(process, lambda: lines.exists() and lines.read_bytes().count(b"\n") > 5)
    process.kill()
    process.join()
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    return "" if len(found) > 5 else f"{len(found)} lines"


@fault("predict: the system takes no more of a picture")
def _predict_full(bench: Bench) -> str:
    """One line; what was found before is on the disk."""
    out, files = bench.fresh(), _photos(bench, 4)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 600, 3), np.uint8)).save(
        files[2]
    )

    asked = _predict(bench, out, files)

    def look() -> int:
        small_files(900_000)()
        return predict_command(asked)

    end = bench.do(out, look)
    return end.one_line() or ("" if _entries(out) >= 2 else f"{_entries(out)} entries")


@fault("export to a file that can't be written", "/proc/none/small.safetensors", None)
@fault("export that the system takes no more of", "", small_files(10**5))
def _export(name: str, begin: Callable[[], None] | None, bench: Bench) -> str:
    """One line; the former file stays as it was."""
    whole, out = bench.whole(), bench.fresh()
    file = bench.folder / "small.safetensors"
    file.write_bytes(b"former")

    def work() -> None:
        if begin:
            begin()
        source = str(whole / "model_final.pth")
        config = ["--config-file", str(whole / "config.yaml")]
        checkpoint_command(["export", *config, source, name or str(file)])

    end = bench.do(out, work)
    kept = file.read_bytes() == b"former" and not list(bench.folder.glob("*.partial"))
    return end.one_line() or ("" if kept else "the former file is gone, or half a one was left")


@fault("eight threads with one detector")
def _threads(bench: Bench) -> str:
    """Each finds what one thread finds."""

    def work() -> int:
        cfg = load_config(bench.whole() / "config.yaml")
        torch.manual_seed(0)
        detector = Detector(instantiate(cfg.model).eval(), 64, "cpu", 0.0)
        rng = np.random.default_rng(0)
        pictures = [rng.integers(0, 255, (40 + 8 * i, 60, 3), dtype=np.uint8) for i in range(4)]
        texts = [["red circle"], ["blue square", "red circle"], ["a", "b", "c"]]
        asked = [(p, t) for p in pictures for t in texts]
        wanted = [detector(*pair) for pair in asked]
        odd: list[int] = []

        def ask(thread: int) -> None:
            for i in np.random.default_rng(thread).permutation(len(asked)).tolist():
                found = detector(*asked[i])
                same = torch.equal(found.scores, wanted[i].scores)
                if not same or found.phrases != wanted[i].phrases:
                    odd.append(i)

        threads = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(f"{len(odd)} differ")
        return 3 if odd else 0

    end = bench.do(bench.fresh(), work)
    return "" if end.status == 0 else f"status {end.status}: {end.said[-300:]}"


def try_fault(bench: Bench, name: str) -> dict:
    """What stands in reliability.json of it."""
    wanted = FAULTS[name]
    start = time.monotonic()
    try:
        said = wanted(bench)
    except Exception as error:  # the harness itself, or files that should be there
        said = f"{type(error).__name__}: {error}"
    should = " ".join((wanted.__doc__ or "").split())
    seconds = round(time.monotonic() - start, 1)
    return {"fault": name, "should": should, "otherwise": said[:600], "seconds": seconds}


__all__ = ["FAULTS", "End", "LAST", "read_checkpoint", "try_fault"]
