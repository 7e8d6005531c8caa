"""Which images are drawn, what is kept of a run, and the table of all."""

import json

import few_shot
import numpy as np
import pytest
from dynamic_dino.data.datasets import load_datasets
from dynamic_dino.data.synthetic.drawn import write_drawn_dataset
from helpers.seeds import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from lib import tables
from lib.shots import covering_order


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    write_drawn_dataset(root / "shapes", 12, 96, seed=1, split="train")
    write_drawn_dataset(root / "shapes", 3, 96, seed=2, split="val")
    return root


def names(records, rows) -> set[int]:
    return {a["category_id"] for row in rows for a in records[int(row)]["annotations"]}


@settings(max_examples=examples(20))
@given(seed=st.integers(0, 1000), count=st.integers(1, 12))
def test_shots_show_as_many_names_as_they_can(drawn, seed, count):
    records = load_datasets(f"{drawn}/shapes/drawn/annotations/train.json")
    order = covering_order(records, seed)
    assert sorted(order) == list(range(len(records)))
    seen = [names(records, order[:k]) for k in range(len(order) + 1)]
    new = [len(b) - len(a) for a, b in zip(seen, seen[1:], strict=False)]
    assert new == sorted(new, reverse=True), "the most new names come first"
    every = names(records, range(len(records)))
    assert seen[count] == every or new[count - 1] > 0
    best = max(len(names(records, [row])) for row in range(len(records)))
    assert len(seen[1]) == best
    assert np.array_equal(order, covering_order(records, seed))


def report_of(*runs) -> dict:
    return {
        "settings": {"start": "nano-dense"},
        "before": {"shapes": {"AP": 9.0, "AP50": 20.0}},
        "runs": {
            str(i): {
                **{"set": "shapes", "images": 10, "photos": 10, "iterations": 90},
                **{"model": model, "seed": seed, "scores": {"AP": ap, "AP50": 2 * ap}},
            }
            for i, (model, seed, ap) in enumerate(runs)
        },
    }


def test_the_table_pairs_seeds():
    text = tables.few_shot(
        report_of(("dense", 0, 40.0), ("dense", 1, 42.0), ("x16", 0, 41.0), ("control", 0, 30.0))
    )
    dense, x16, control = text.splitlines()[-3:]
    assert "9.0 -> 41.0 ± 12.7 | 20.0 -> 82.0 ± 25.4 |  | +10.0 |" in dense
    assert x16.endswith("| +1.0 | +11.0 |") and control.endswith("| -10.0 |  |")


@pytest.mark.slow
def test_a_run_is_kept_and_not_repeated(drawn, tmp_path, capsys):
    words = [
        *("--data", drawn, "--sets", "shapes", "--images", "2", "--seeds", "0"),
        *("--models", "dense", "--most", "1", "--device", "cpu"),
        *("--out", tmp_path / "few_shot.json", "--work", tmp_path / "work"),
        *("--override", "inference.size=96", "--override", "model.canvas=96"),
    ]
    words = [str(word) for word in words]
    assert few_shot.main(words) == 0
    report = json.loads((tmp_path / "few_shot.json").read_text())
    (run,) = report["runs"].values()
    assert run["photos"] == 2 and run["iterations"] == 1 and run["scores"].keys() == {"AP", "AP50"}
    assert {"machine", "versions", "commit", "command"} <= report.keys()
    assert not list((tmp_path / "work").rglob("*.pth"))
    capsys.readouterr()
    more = [*words[: words.index("0") + 1], "1", *words[words.index("0") + 1 :]]
    assert few_shot.main([*more, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == ["shapes, 2 images, seed 1, dense"]
    with pytest.raises(SystemExit, match="delete it to start anew"):
        few_shot.main([*words, "--most", "2"])
