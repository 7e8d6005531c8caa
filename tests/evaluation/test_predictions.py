"""Results files: read as a stream, written a line a detection, and what is wrong with them."""

import json

import numpy as np
import pytest
from dynamic_dino.evaluation.predictions import DatasetPredictions
from helpers.seeds import fresh_rng


def random_rows(rng, count=500):
    return [
        {
            "image_id": int(rng.integers(1, 50)),
            "category_id": int(rng.integers(1, 9)),
            "bbox": rng.uniform(0, 2000, 4).astype(np.float32).tolist(),
            "score": float(np.float32(rng.random())),
        }
        for _ in range(count)
    ]


def rows_of(predictions):
    columns = (
        predictions.image_ids,
        predictions.category_ids,
        predictions.boxes,
        predictions.scores,
    )
    names = ("image_id", "category_id", "bbox", "score")
    return [
        dict(zip(names, row, strict=True))
        for row in zip(*(c.tolist() for c in columns), strict=True)
    ]


def test_written_and_read_again(tmp_path):
    rows = random_rows(fresh_rng())
    found = DatasetPredictions.read(rows)
    assert rows_of(found) == rows
    # as the evaluator has them: every float32 comes back
    single = DatasetPredictions(
        found.image_ids,
        found.category_ids,
        found.boxes.astype(np.float32),
        found.scores.astype(np.float32),
    )
    single.write(tmp_path / "predictions.json")
    again = DatasetPredictions.read(tmp_path / "predictions.json")
    assert (again.boxes.astype(np.float32) == single.boxes).all()
    assert (again.scores.astype(np.float32) == single.scores).all()
    assert len(json.loads((tmp_path / "predictions.json").read_text())) == len(rows)
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.json"]

    DatasetPredictions.read([]).write(tmp_path / "none.json")
    assert len(DatasetPredictions.read(tmp_path / "none.json")) == 0
    text = [row | {"image_id": f"photo {row['image_id']}"} for row in rows]
    DatasetPredictions.read(text).write(tmp_path / "text.json")
    assert DatasetPredictions.read(tmp_path / "text.json").image_ids.tolist() == [
        row["image_id"] for row in text
    ]


@pytest.mark.parametrize("cut", [3, 50, -1, -20])
def test_a_truncated_file_is_named(tmp_path, cut):
    text = json.dumps(random_rows(fresh_rng(), 20))
    (tmp_path / "cut.json").write_text(text[:cut])
    with pytest.raises(ValueError, match="cut.json is not valid JSON .* truncated"):
        DatasetPredictions.read(tmp_path / "cut.json")
    (tmp_path / "other.json").write_text('{"annotations": []}')
    with pytest.raises(ValueError, match="other.json is not a valid JSON list.*COCO results"):
        DatasetPredictions.read(tmp_path / "other.json")
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        DatasetPredictions.read(tmp_path / "nowhere.json")


def test_best_of_each_group_against_a_loop():
    rng = fresh_rng()
    rows = random_rows(rng, 600)
    for row in rows:
        row["score"] = round(row["score"], 1)  # ties
    found = DatasetPredictions.read(rows)
    for key, best in (("image_id", found.best_per_image), ("category_id", found.best_per_class)):
        for most in (1, 7, 1000):
            kept = []
            for group in {row[key] for row in rows}:
                mine = [i for i, row in enumerate(rows) if row[key] == group]
                kept += sorted(mine, key=lambda i: -rows[i]["score"])[:most]
            assert rows_of(best(most)) == [rows[i] for i in sorted(kept)]
    assert len(found[:0].best_per_class(5)) == 0
