"""The harness of kills, faults and bad inputs tells what is right from what isn't."""

import json
import mmap
import random
import time

import pytest
from lib import tables, trials
from lib.bad_inputs import FAMILIES
from lib.faults import FAULTS
from lib.mutations import ABSENT, KINDS, Reading, changed, mutants, places
from lib.trials import OUTCOMES, Trial, try_all

GOOD = {"images": [{"id": 1, "name": "a cat", "width": 60, "iscrowd": 0, "note": "x"}]}


def plain(content: bytes) -> str:
    """A reader as it should be, of what is above."""
    [image] = json.loads(content)["images"]
    if not isinstance(image["width"], int) or image["width"] < 1 or "cat" not in image["name"]:
        raise ValueError("no")
    crowd = str(image.get("iscrowd", 0)).lower() in ("1", "true")
    return repr((image["name"], image["width"], crowd))


@pytest.mark.parametrize(
    ("place", "value", "wrong"),
    [
        ("width", 30, ""),
        ("name", "a grey cat", ""),
        ("note", None, ""),
        ("iscrowd", "0", ""),
        ("iscrowd", "true", ""),
        ("iscrowd", ABSENT, ""),
        ("iscrowd", "many", "images.0.iscrowd: 'many' in place of 0 was read as before"),
        ("iscrowd", [1], "images.0.iscrowd: [1] in place of 0 was read as before"),
        ("name", "cat\0", r"images.0.name: 'cat\x00' in place of 'a cat' was accepted"),
    ],
)
def test_what_is_read_otherwise_than_it_says(place, value, wrong):
    reading = Reading(json.dumps(GOOD).encode(), "json", plain)
    content = json.dumps(changed(GOOD, ("images", 0, place), value)).encode()
    assert reading.misreading(content, plain(content)) == wrong
    assert "invalid" in reading.misreading(content[:-2], reading.wanted)


def test_every_kind_of_file_is_written_as_it_was_read(rng):
    files = {
        "json": json.dumps(GOOD).encode(),
        "jsonl": b'{"a": 1}\n{"a": [2]}\n',
        "xml": b'<a b="1"><c>2</c><c d="x" /></a>',
        "csv": b"a,b\r\n1,x y\r\n",
        "txt": b"0 0.5 0.25\n1 1 1\n",
        "yaml": b"names: [a, b]\ntrain: images\n",
    }
    for kind, content in files.items():
        codec = KINDS[kind]
        found = codec.read(content)
        assert codec.read(codec.write(found)) == found and [*places(found)]
        made = mutants(content, kind, 40, random.Random(0))
        assert len(made) == 40 and made == mutants(content, kind, 40, random.Random(0))
        assert sum(bad != content for _, bad in made) > 35


def test_each_way_to_end_is_told(monkeypatch):
    monkeypatch.setattr(trials, "MEMORY", 1 << 23)

    def fails(error):
        raise error

    def fills():  # memory that the process can't have had before
        with mmap.mmap(-1, 3 << 23) as room:
            room.write(bytes(len(room)))
        return ""

    tried = [
        Trial("clean", lambda: fails(ValueError("a.json: bad")), ("a.json",)),
        Trial("accepted", lambda: ""),
        Trial("unclear", lambda: fails(ValueError("bad")), ("a.json",)),
        Trial("unclear", lambda: fails(OSError("a.json:\nbad")), ("a.json",)),
        Trial("traceback", lambda: fails(KeyError("a.json"))),
        Trial("wrong", lambda: "another box"),
        Trial("hang", lambda: time.sleep(60)),
        Trial("memory", fills),
        Trial("memory", lambda: fails(MemoryError())),
        Trial("accepted", lambda: ""),
    ]
    found = [(ended.name, ended.outcome) for ended in try_all(tried, hang=5.0)]
    assert found == [(trial.name, trial.name) for trial in tried]


def test_a_little_of_every_family(tmp_path):
    """Made from a seed; none ends otherwise than it should."""
    for name in ("annotations", "images", "predictions"):
        make, _ = FAMILIES[name]
        made = random.Random(3).sample(make(tmp_path / name, 60, random.Random(1)), 5)
        odd = [e for e in try_all(made) if e.outcome not in ("clean", "accepted")]
        assert not odd


def test_the_table():
    inputs = {outcome: 3 for outcome in OUTCOMES} | {"tried": 21, "examples": {}}
    kill = {"moment": "saving", "rows": 3, "checkpoint": 4}
    chain = {"recipe": "dense", "kills": [kill, kill], "checkpoint_lost": "", "differs": ""}
    report = {"kills": [chain, chain | {"differs": "results.json differs"}], "images": inputs}
    row = {"fault": "SIGTERM", "should": "end", "otherwise": "it went on", "seconds": 1.0}
    text = tables.reliability(report | {"faults": [row, row | {"otherwise": ""}]})
    assert "| kill -9 (saving: 4) | 22 in 6 runs | 0 runs | 4 in 2 runs | 1 runs |" in text
    assert "| other faults | 32 | 17 | 2 | 1 |" in text
    assert "- SIGTERM: it went on\n- kills: results.json differs" in text
    assert "|  | now | 21 | 3 | 3 | 3 | 3 | 3 | 3 | 3 |" in text
    assert len(FAULTS) > 60 and all(f.__doc__ for f in FAULTS.values())
