"""The sheet of pictures beside an evaluation's numbers."""

import numpy as np
from dynamic_dino.evaluation import pictures
from dynamic_dino.evaluation.coco import read_ground_truth
from dynamic_dino.evaluation.pictures import results_sheet
from dynamic_dino.evaluation.predictions import DatasetPredictions
from helpers.seeds import fresh_rng
from PIL import Image

NAMES = {3: "red panda", 7: "mug"}


def scene(folder, rng, images=20):
    truth, files = {"images": [], "annotations": [], "categories": [{"id": c} for c in NAMES]}, {}
    for i in range(images):
        truth["images"].append({"id": f"i{i}"})
        files[f"i{i}"] = str(folder / f"{i}.png")
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(files[f"i{i}"])
        for k in range(i % 3):  # every third image has no object
            box = [5 * k, 4, 20, 10]
            truth["annotations"].append({"image_id": f"i{i}", "category_id": 7, "bbox": box})
    count = 5 * images
    found = DatasetPredictions(
        np.array(sorted(files) * 5),
        rng.choice(list(NAMES), count),
        rng.uniform(1, 20, (count, 4)),
        rng.random(count),
    )
    return read_ground_truth(truth), found, files


def test_the_best_detections_as_many_as_objects(tmp_path, monkeypatch):
    truth, found, files = scene(tmp_path, fresh_rng())
    drawn, draw = [], pictures.draw_boxes
    monkeypatch.setattr(pictures, "draw_boxes", lambda *a: drawn.append(a) or draw(*a))
    sheet = results_sheet(truth, found, files, NAMES, count=5)
    assert sheet.dtype == np.uint8 and sheet.shape[1] == 1600 and len(drawn) == 5
    with_objects = [f"i{i}" for i in range(20) if i % 3]
    shown = [with_objects[int(i * len(with_objects) / 5)] for i in range(5)]  # spread over all
    for image_id, (image, boxes, phrases, scores) in zip(shown, drawn, strict=True):
        objects = [a for a in truth["annotations"] if a["image_id"] == image_id]
        mine = found[found.image_ids == image_id]
        best = np.sort(mine.scores)[::-1][: len(objects)]
        np.testing.assert_array_equal(scores, best)
        row = mine[mine.scores == best[0]]
        x, y, w, h = row.boxes[0]
        np.testing.assert_allclose(boxes[0], [x, y, x + w, y + h])
        assert phrases[0] == NAMES[int(row.category_ids[0])]
        left, top = map(int, objects[0]["bbox"][:2])
        assert (image[top, left + 3] == 0).all() and (image[top + 1, left + 3] == 255).all()


def test_images_that_are_not_there_are_left_out(tmp_path):
    truth, found, files = scene(tmp_path, fresh_rng(), images=4)
    assert results_sheet(truth, found, {}, NAMES) is None
    missing = dict.fromkeys(files, str(tmp_path / "none.png"))
    assert results_sheet(truth, found, missing, NAMES) is None
    assert results_sheet(truth, found, missing | {"i1": files["i1"]}, NAMES) is not None
    assert results_sheet(truth, found[:0], files, NAMES) is not None  # nothing was found
