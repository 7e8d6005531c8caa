import json
import pickle

import numpy as np
import pytest
from detectron2.structures import BoxMode
from dynamic_dino.data.json_stream import stream_json, stream_json_list
from dynamic_dino.data.records import Mixture, Records, Texts
from dynamic_dino.files import written_whole
from helpers.seeds import fresh_rng


def random_records(rng, count, extra=False, ids=int):
    """`Records` and the same as dicts."""
    dicts = []
    for i in range(count):
        annotations = [
            {
                "bbox": rng.integers(1, 50, 4).astype(float).tolist(),
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": int(rng.integers(0, 20_000)),
                "iscrowd": int(rng.random() < 0.3),
            }
            for _ in range(rng.integers(0, 4))
        ]
        record = {
            "file_name": f"/root/{'é' * int(rng.integers(0, 3))}{i}.jpg",
            "image_id": ids(i + 5),
            "height": int(rng.integers(1, 2000)),
            "width": int(rng.integers(1, 2000)),
            "dataset_name": "some",
            "annotations": annotations,
        }
        if extra:
            record |= {"caption": f"a thing {i}", "phrase_spans": [[[0, 1], [2, 7]]]}
        dicts.append(record)
    flat = [a for d in dicts for a in d["annotations"]]
    records = Records(
        "some",
        "/root",
        Texts.of(d["file_name"].removeprefix("/root/") for d in dicts),
        np.array([d["image_id"] for d in dicts]) if ids is int else [d["image_id"] for d in dicts],
        np.array([(d["width"], d["height"]) for d in dicts]).reshape(-1, 2),
        np.cumsum([0] + [len(d["annotations"]) for d in dicts]),
        np.array([a["bbox"] for a in flat]).reshape(-1, 4),
        np.array([a["category_id"] for a in flat], dtype=int),
        np.array([a["iscrowd"] for a in flat], dtype=bool),
        Texts.of(json.dumps({k: d[k] for k in ("caption", "phrase_spans")}) for d in dicts)
        if extra
        else None,
    )
    return records, dicts


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("ids", [int, str])
def test_records_are_the_dicts(extra, ids):
    rng = fresh_rng()
    records, dicts = random_records(rng, 20, extra, ids)
    assert list(records) == dicts and len(records) == 20
    assert records[-1] == dicts[-1] and records[3:7] == dicts[3:7]
    assert records[np.int64(4)] == dicts[4]
    with pytest.raises(IndexError):
        records[20]
    records[0]["annotations"].clear()  # a record is the caller's own
    assert records[0] == dicts[0]
    objects = [any(not a["iscrowd"] for a in d["annotations"]) for d in dicts]
    assert records.with_objects().tolist() == objects
    assert list(records.on(records.buffers())) == dicts
    assert list(pickle.loads(pickle.dumps(records))) == dicts


def test_mixture_is_the_sources_one_after_the_other():
    rng = fresh_rng()
    parts = [random_records(rng, n, extra) for n, extra in ((3, False), (0, False), (5, True))]
    plain = [{"annotations": [{}], "number": n} for n in range(4)]
    expected = [d for _, dicts in parts for d in dicts] + plain
    mixture = Mixture([*(records for records, _ in parts), plain])
    assert len(mixture) == 12 and [mixture[i] for i in range(12)] == expected
    with pytest.raises(IndexError):
        mixture[12]
    kept = Mixture(
        [parts[0][0], parts[2][0], plain], [np.array([2]), None, np.array([], dtype=int)]
    )
    assert [kept[i] for i in range(len(kept))] == [parts[0][1][2], *parts[2][1]]
    assert mixture.sources[0] is parts[0][0]  # no copy


def test_no_records_at_all():
    records, _ = random_records(fresh_rng(), 0)
    assert len(records) == 0 and list(records) == [] and records.with_objects().tolist() == []


def random_value(rng, depth=0):
    kind = rng.integers(0, 8 if depth < 3 else 6)
    if kind == 0:
        return float(rng.normal() * 10.0 ** rng.integers(-20, 20))
    if kind == 1:
        return int(rng.integers(-(1 << 40), 1 << 40))
    if kind == 2:
        return "".join(rng.choice(list('aé"\\/\n{}[],: 日'), size=rng.integers(0, 30)))
    if kind < 6:
        return [None, True, False][kind - 3]
    if kind == 6:
        return [random_value(rng, depth + 1) for _ in range(rng.integers(0, 5))]
    return {
        str(random_value(rng, 3)): random_value(rng, depth + 1) for _ in range(rng.integers(0, 5))
    }


@pytest.mark.parametrize("chunk", [7, 64, 1 << 18])
def test_streaming_equals_json(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("dynamic_dino.data.json_stream.BUFFER", chunk)
    rng = fresh_rng()
    for indent in (None, 2):
        content = {f"list{i}": [random_value(rng) for _ in range(6)] for i in range(3)}
        content |= {"empty": [], "other": random_value(rng), "number": 12345}
        file = tmp_path / "a.json"
        file.write_text(json.dumps(content, indent=indent, ensure_ascii=bool(indent)))
        found = {"list0": [], "list2": [], "empty": []}
        for key, index, item in stream_json(file, list(found)):
            assert index == len(found[key])
            found[key].append(item)
        assert found == {key: content[key] for key in found}


def test_streaming_notices_every_truncation(tmp_path, monkeypatch):
    monkeypatch.setattr("dynamic_dino.data.json_stream.BUFFER", 16)
    text = json.dumps({"images": [{"id": 1, "file_name": "a"}], "n": 12, "annotations": [1.5, 22]})
    file = tmp_path / "a.json"
    for end in range(len(text)):
        file.write_text(text[:end])
        with pytest.raises(ValueError, match=r"a\.json is not valid JSON.*truncated"):
            list(stream_json(file, ["images", "annotations"]))
    file.write_text(text.replace("22", "2 2"))
    with pytest.raises(ValueError, match="is not valid JSON"):
        list(stream_json(file, ["images", "annotations"]))
    file.write_text(text)
    with pytest.raises(ValueError, match="has no list 'categories'"):
        list(stream_json(file, ["images", "categories"]))


def test_a_list_by_itself(tmp_path):
    file = tmp_path / "a.json"
    for content in ([], [1, {"item": [2]}, []]):
        file.write_text(json.dumps(content))
        assert list(stream_json_list(file)) == content
    file.write_text('{"a": [1]}')
    with pytest.raises(ValueError, match="not a valid JSON list"):
        list(stream_json_list(file))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new/a.json"
    with written_whole(file) as out:
        out.write("first")
    with pytest.raises(RuntimeError), written_whole(file) as out:
        out.write("second, of which only a part")
        raise RuntimeError
    assert file.read_text() == "first" and list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("extra, ids", [(False, int), (True, str)])
def test_some_of_the_records(extra, ids):
    """In any order, also those without boxes."""
    records, dicts = random_records(fresh_rng(), 9, extra, ids)
    rows = np.array([8, 0, 3, 4])
    assert list(records.select(rows)) == [dicts[i] for i in rows]
    assert list(records.select(rows[:0])) == []
