"""Data at addresses and in shards give the samples of local files, through faults of the server."""

import json
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from dynamic_dino import remote
from dynamic_dino.data import TestMapper, load_datasets
from dynamic_dino.data.__main__ import main
from dynamic_dino.data.datasets import locate_dataset
from dynamic_dino.sources import resolve
from helpers import miniatures
from helpers.seeds import fresh_rng
from PIL import Image


@pytest.fixture
def local(tmp_path):
    rng, folder = fresh_rng(), tmp_path / "local"
    (folder / "photos").mkdir(parents=True)
    images, annotations = [], []
    for i in range(5):
        width, height = rng.integers(20, 60, 2).tolist()
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(
            folder / f"photos/{i} #1.png"
        )
        name = f"photos/{i} #1.png"
        images.append({"id": 7 + i, "file_name": name, "width": width, "height": height})
        box = [1.25, 2, *rng.uniform(2, 15, 2).tolist()]
        annotations.append({"id": i, "image_id": 7 + i, "category_id": 3 + i % 2, "bbox": box})
    categories = [{"id": 3, "name": "red mug"}, {"id": 4, "name": "kite", "near_synonyms": [3]}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "data.json").write_text(json.dumps(content))
    return folder


def samples(name):
    """What training gets, without where it comes from."""
    mapper = TestMapper(dataset=name, size=32)
    found = [mapper(record) for record in load_datasets(name)]
    return [
        {
            "image": s["image"],
            "id": s["image_id"],
            "prompt": s["prompt"].phrases,
            "boxes": s["instances"].gt_boxes.tensor,
            "classes": s["instances"].gt_classes,
        }
        for s in found
    ]


def assert_same(mine, theirs):
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        for key, value in a.items():
            same = torch.equal(value, b[key]) if torch.is_tensor(value) else value == b[key]
            assert same, key


def test_same_samples_from_s3_and_shards_through_faults(
    local, bucket, server, tmp_path, monkeypatch, capsys
):
    shards = tmp_path / "shards"
    arguments = ["shard", str(local / "data.json"), str(shards), "--shard-mb", "0.006"]
    assert main(arguments) == 0
    files = sorted(shards.glob("*.zip"))
    assert len(files) > 1
    before = {file.name: file.read_bytes() for file in files}
    files[0].unlink()  # an interrupted run goes on
    (shards / "annotations.json").unlink()
    assert main(arguments) == 0 and f"{len(files) - 1} of them there" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in files} == before

    bucket.put(str(local), "bucket/plain", recursive=True)
    bucket.put(str(shards), "bucket/shards", recursive=True)
    expected = samples(str(local / "data.json"))
    assert_same(samples(str(shards)), expected)
    monkeypatch.setattr(remote, "_FIRST", 0.01)
    server.faults += ["500 Oops", "reset", "503 Slow Down"] * 4
    assert_same(samples("s3://bucket/plain/data.json"), expected)
    server.faults += ["500 Oops", "reset"] * 3
    assert_same(samples("s3://bucket/shards"), expected)
    assert not server.faults
    drawn = [locate_dataset(f"s3://bucket/shards:{part}").drawn for part in ("train", "val")]
    assert drawn == ["train", "val"]

    records, mapper = load_datasets("s3://bucket/shards"), TestMapper("s3://bucket/shards", size=32)
    server.asked.clear()  # a second epoch, from the cache
    assert len([mapper(record) for record in records]) == 5 and not server.asked

    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"first")
    bucket.put(str(weights), "bucket/w.safetensors")
    assert resolve("s3://bucket/w.safetensors").read_bytes() == b"first"
    bucket.pipe("bucket/w.safetensors", b"another")
    assert resolve("s3://bucket/w.safetensors").read_bytes() == b"another"
    assert resolve("s3://bucket/plain/photos").is_dir()
    with pytest.raises(FileNotFoundError, match="s3://bucket/none.pth does not exist"):
        resolve("s3://bucket/none.pth")
    with pytest.raises(ValueError, match="no folder of shards"):
        locate_dataset("s3://bucket/plain")


def test_list_says_what_is_there(bucket, tmp_path, rng, monkeypatch, capsys):
    miniatures.write_v3det(tmp_path / "datasets", rng)
    bucket.put(str(tmp_path / "datasets"), "bucket/datasets", recursive=True)
    monkeypatch.setenv("DETECTRON2_DATASETS", "s3://bucket/datasets")
    assert main(["list"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("in s3://bucket/datasets ")
    found = {line.split()[1] for line in lines if line.startswith("found")}
    assert found == {"v3det_train"}
    assert "not found  gqa_train" in "\n".join(lines)


def test_a_server_that_stays_down_is_one_error(monkeypatch, tmp_path):
    monkeypatch.setenv(remote.CACHE, str(tmp_path))
    clock = [0.0]
    monkeypatch.setattr(remote.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(remote.time, "sleep", lambda s: clock.__setitem__(0, clock[0] + s))

    def down(fs, path):
        raise ConnectionError("refused")

    with pytest.raises(remote.RemoteError, match=r"memory://a/b can't be read .*--resume"):
        remote._persistently("memory://a/b", down)
    assert 250 < clock[0] <= 300
    clock[0] = 0

    def forbidden(fs, path):
        raise PermissionError("no")

    with pytest.raises(remote.RemoteError, match="may be read from this machine"):
        remote._persistently("memory://a/b", forbidden)
    assert clock[0] == 0


@pytest.mark.parametrize("takes", [0.01, 9.0])  # 9 s: botocore, where a port is closed
def test_what_lasts_is_said_once(takes, monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr(remote.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(remote.time, "sleep", lambda s: clock.__setitem__(0, clock[0] + s))

    def down_until(back):
        def read(fs, path):
            if clock[0] < back:
                clock[0] += takes
                raise ConnectionError("refused")
            return b"content"

        return read

    assert remote._persistently("memory://a/b", down_until(clock[0] + 0.5)) == b"content"
    assert takes > 1 or not caplog.text, "it was over in a moment"
    caplog.clear()
    assert remote._persistently("memory://a/b", down_until(clock[0] + 30)) == b"content"
    assert caplog.text.count("memory://a/b can't be read") == 1 and "waiting for it" in caplog.text


def test_a_fault_is_no_answer(tmp_path, monkeypatch):
    """What can't be reached isn't said to be absent."""
    memory, faults = fsspec.filesystem("memory"), [ConnectionError("refused")] * 3
    memory.pipe(f"/{tmp_path.name}/there", b"content")
    info = type(memory).info

    def faulty(self, path, **options):
        if faults:
            raise faults.pop()
        return info(self, path, **options)

    monkeypatch.setattr(remote, "_FIRST", 0.01)
    monkeypatch.setattr(type(memory), "info", faulty)
    assert remote.exists(f"memory://{tmp_path.name}/there") and not faults
    faults += [ConnectionError("refused")] * 3
    assert not remote.exists(f"memory://{tmp_path.name}/absent") and not faults
    assert not remote.exists(f"memory://{tmp_path.name}")


def test_cache_keeps_to_its_limit_and_what_was_read_last(monkeypatch, tmp_path):
    monkeypatch.setenv(remote.CACHE, str(tmp_path))
    monkeypatch.setenv(remote.LIMIT, "0.00001")  # 10 kB
    fs = fsspec.filesystem("memory")
    for i in range(30):
        fs.pipe(f"/many/{i}", bytes([i]) * 1000)
        assert remote.read(f"memory://many/{i}", 10, 20) == bytes([i]) * 20
        assert remote.read(f"memory://many/{i}") == bytes([i]) * 1000
        remote.read("memory://many/0")
        time.sleep(0.002)
    files = [file for file in (tmp_path / "remote").rglob("*") if file.is_file()]
    assert 5_000 < sum(file.stat().st_size for file in files) <= 10_000
    fs.rm("/many", recursive=True)
    assert remote.read("memory://many/0") == bytes(1000)  # read most often
    with pytest.raises(FileNotFoundError):
        remote.read("memory://many/1")


def test_addresses_survive_path(tmp_path):
    assert remote.address("s3:/bucket/a.json") == remote.address("s3://bucket/a.json")
    assert remote.address("s3://bucket/a.json") == "s3://bucket/a.json"
    assert remote.address(Path("hf://datasets/a/b")) == "hf://datasets/a/b"
    hub = ("hf:owner/name", f"hf:{tmp_path}")
    for path in (tmp_path, "C:/a", "a/https://b", "data.json", "package:a/b", *hub):
        assert remote.address(path) is None
