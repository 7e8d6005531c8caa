"""Files that are written whole, and folders with one writer."""

import json
import multiprocessing
import os
import signal
import time

import pytest
from dynamic_dino.config import ConfigError
from dynamic_dino.engine.setup import sole_run
from dynamic_dino.files import FolderInUseError, sole_writer, written_whole


def hold(folder, ready):
    with sole_writer(folder):
        (folder / "model.pth.1-a.partial").touch()
        ready.set()
        time.sleep(60)


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    file = tmp_path / "file"
    with written_whole(file) as first, written_whole(file) as second:
        first.write("first" * 100)
        second.write("second")
    assert file.read_text() == "first" * 100, "whole; the one that ended last"
    assert file.stat().st_mode & 0o044 or os.umask(0o022) & 0o044, "others may read it"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_has_one_writer(tmp_path, caplog):
    context = multiprocessing.get_context("fork")
    folder, ready = tmp_path / "run", context.Event()
    process = context.Process(target=hold, args=(folder, ready), daemon=True)
    process.start()
    assert ready.wait(30)
    with pytest.raises(FolderInUseError, match=f"process {process.pid} on .*, since 2"):
        with sole_writer(folder):
            pass
    with pytest.raises(ConfigError, match="train.output_dir=FOLDER"), sole_run(folder):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert json.loads((folder / "running.json").read_text())["pid"] == process.pid
    with sole_writer(folder), sole_writer(folder):  # a run's parts may all ask for it
        assert not list(folder.glob("*.partial")), "what was left half written"
        assert json.loads((folder / "running.json").read_text())["pid"] == os.getpid()
    assert f"was left by process {process.pid}" in caplog.text
    assert not (folder / "running.json").exists()
