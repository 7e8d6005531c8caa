"""Files that are written whole, and folders with one writer."""

import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from dynamic_dino.config import ConfigError
from dynamic_dino.engine.setup import sole_run
from dynamic_dino.files import (
    DiskFullError,
    FolderInUseError,
    LogFile,
    sole_writer,
    written_whole,
)
from helpers.seeds import examples
from hypothesis import given, settings
from hypothesis import strategies as st


def hold(folder, ready):
    with sole_writer(folder):
        (folder / "model.pth.1-a.partial").touch()
        (folder / "yolo.1-a.partial").mkdir()
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


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(
        DiskFullError, match=rf"{file} can't be written: it takes 1,000,000,000,000"
    ):
        with written_whole(file, needed=10**18):
            pass
    with pytest.raises(DiskFullError, match=r"it takes 5,000 bytes, .* are free \(No space left"):
        with written_whole(file, binary=True) as out, open("/dev/full", "wb", buffering=0) as full:
            out.write(bytes(5000))
            out.flush()
            full.write(b"1")
    with pytest.raises(FileNotFoundError), written_whole(file):  # another's error stays what it is
        open(tmp_path / "nothing")
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["file"]


class Disk:
    """A file on a disk with so much room."""

    def __init__(self, room):
        self.room, self.content = room, b""

    def write(self, part):
        taken = part[: self.room]
        if part and not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(taken)
        self.content += taken
        return len(taken)

    def close(self):
        pass


@settings(max_examples=examples(50), deadline=None)
@given(st.integers(0, 9), st.lists(st.tuples(st.text(max_size=9), st.integers(0, 9))))
def test_a_log_has_all_lines_in_order_once_there_is_room(room, lines):
    log = LogFile(Path(os.devnull))
    log._file.close()
    log._file = disk = Disk(room)
    for text, more in lines:
        log.write(text)
        log.flush()
        disk.room += more
    whole = "".join(text for text, _ in lines).encode("utf-8", "backslashreplace")
    assert whole.startswith(disk.content)
    if disk.room < len(whole) - len(disk.content):
        with pytest.raises(DiskFullError):
            log.settle()
    disk.room += len(whole)
    log.close()
    assert disk.content == whole


def test_a_log_on_a_full_disk_warns_once(caplog):
    log = LogFile(Path("/dev/full"))
    for _ in range(3):
        log.write("line\n")
        log.flush()
    [record] = caplog.records
    assert "/dev/full can't be written: it takes 5 bytes" in record.getMessage()
    with pytest.raises(DiskFullError, match="No space left on device"):
        log.close()


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
