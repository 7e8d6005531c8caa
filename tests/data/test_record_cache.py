"""Large annotation files are read once a machine, and again when anything about them changes."""

import json
import logging
import threading
import time

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from dynamic_dino.data import datasets, record_cache
from dynamic_dino.data.places import locate_dataset
from helpers import miniatures
from helpers.seeds import fresh_rng

WRITERS = {
    "objects365_v1_train": miniatures.write_objects365,
    "v3det_train": miniatures.write_v3det,
    "lvis_v1_val": miniatures.write_lvis,
    "gqa_train": miniatures.write_gqa,
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(record_cache, "LARGE", 0)
    monkeypatch.setenv(record_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch):
    """The files that were read, not opened from the cache."""
    seen = []
    for kind, reader in datasets.LOADERS.items():

        def counting(file, *args, reader=reader, **options):
            seen.append(file.name)
            return reader(file, *args, **options)

        monkeypatch.setitem(datasets.LOADERS, kind, counting)
    return seen


def write_odvg(root, rng):
    boxes = [{"bbox": [1, 2, *rng.integers(5, 60, 2).tolist()], "label": 1, "category": "red mug"}]
    lines = [
        {"filename": f"{i}.png", "width": 64, "height": 64, "detection": {"instances": boxes}}
        for i in range(3)
    ]
    (root / "label_map.json").write_text('{"0": "mole", "1": "red mug"}')
    file = root / "some.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def load(name, root):
    """Records as plain data, and metadata."""
    records = datasets.load_file(locate_dataset(name, root=root))
    return records, list(records), MetadataCatalog.get(records.dataset_name).as_dict()


@pytest.mark.parametrize("name", [*WRITERS, "odvg"])
def test_what_is_opened_is_what_was_read(tmp_path, reads, name, folder):
    rng = fresh_rng()
    writer = WRITERS.get(name, write_odvg)
    file = writer(tmp_path, rng)
    name = str(file) if name == "odvg" else name
    first, plain, metadata = load(name, tmp_path)
    MetadataCatalog.remove(name)
    second, again, other_metadata = load(name, tmp_path)
    assert reads == [file.name] and len(plain) > 2
    assert plain == again and metadata == other_metadata
    assert all(isinstance(array, np.memmap) for array in second.buffers().values())
    assert second.with_objects().tolist() == first.with_objects().tolist()
    assert [type(i) for i in first.ids] == [type(i) for i in second.ids]

    # a damaged entry, and other content
    (entry,) = (path.parent for path in folder.rglob("records.json"))
    (entry / "boxes.npy").write_bytes(b"")
    assert load(name, tmp_path)[1] == plain and len(reads) == 2
    text = file.read_text()
    file.write_text(text.replace('"height": ', '"height": 1', 1))
    changed = load(name, tmp_path)[1]
    assert changed != plain and len(reads) == 3
    assert len(list(folder.rglob("records.json"))) == 1, "the former content's is removed"
    if "some.jsonl" in reads:
        (tmp_path / "label_map.json").write_text('{"0": "red mug"}')
        assert load(name, tmp_path)[2] != metadata and len(reads) == 4


def test_warnings_are_said_again(tmp_path, reads, caplog):
    file = miniatures.write_coco(tmp_path, fresh_rng())
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][2] = 1e4
    file.write_text(json.dumps(content))
    said = []
    for _ in range(2):
        caplog.clear()
        load(str(file), tmp_path)
        said.append([m for m in caplog.messages if "clipped 1 boxes" in m])
    assert reads == [file.name] and said[0] == said[1] and len(said[0]) == 1


def test_others_wait_for_the_one_that_reads(tmp_path, folder, caplog):
    file = miniatures.write_coco(tmp_path, fresh_rng())
    seen, found = [], []

    def read():
        seen.append(1)
        time.sleep(0.1)
        return datasets.load_coco_json(file, tmp_path, "waiting")

    def open_it():
        found.append(record_cache.kept_records([file], {"name": "waiting"}, read))

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1 and len(found) == 4
    assert all(list(records) == list(found[0]) for records in found)


def test_without_a_place_for_the_cache_files_are_read(tmp_path, reads, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "dynamic_dino")
    file = miniatures.write_coco(tmp_path, fresh_rng())
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv(record_cache.VARIABLE, str(tmp_path / "taken"))
    assert load(str(file), tmp_path)[1] == load(str(file), tmp_path)[1]
    assert len(reads) == 2 and "set DYNAMIC_DINO_CACHE" in caplog.text
