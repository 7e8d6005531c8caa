"""What is drawn on photos, and which photos are chosen."""

import numpy as np
import pytest
from dynamic_dino.analysis import pictures
from dynamic_dino.analysis.objects import objects_of
from dynamic_dino.analysis.pictures import before_after, token_pictures, verdicts
from PIL import Image


@pytest.fixture
def photos(scene, tmp_path, rng):
    """A collection whose images are files."""
    collection = scene()
    for image_id in collection.files:
        file = tmp_path / f"{image_id}.png"
        Image.fromarray(rng.integers(0, 255, (240, 240, 3), dtype=np.uint8)).save(file)
        collection.files[image_id] = str(file)
    return collection


def iou(a, b):
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(w, 0) * max(h, 0)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def test_verdicts_against_loops(scene):
    collection = scene()
    objects = objects_of(collection)
    found = verdicts(collection, objects)
    p = collection.predictions
    for image in collection.truth["images"]:
        mine = [a for a in objects.annotations if a["image_id"] == image["id"]]
        if not mine:
            assert image["id"] not in found
            continue
        rows = np.flatnonzero(p.image_ids == image["id"])[: len(mine)].tolist()
        hit, right = set(), []
        for row in rows:
            best = [
                (iou(p.boxes[row], a["bbox"]), k)
                for k, a in enumerate(mine)
                if k not in hit and a["category_id"] == p.category_ids[row]
            ]
            best = [pair for pair in best if pair[0] >= 0.5]
            right.append(bool(best))
            if best:
                hit.add(max(best)[1])
        verdict = found[image["id"]]
        assert (verdict.rows, verdict.right) == (rows, right)
        assert verdict.found == [k in hit for k in range(len(mine))]


def test_queries_in_the_colours_of_their_experts(photos, monkeypatch):
    drawn, draw = [], pictures.draw_boxes
    monkeypatch.setattr(
        pictures, "draw_boxes", lambda *a, **k: drawn.append((a, k)) or draw(*a, **k)
    )
    figure = token_pictures(photos, "", count=2)
    assert figure.image.dtype == np.uint8 and len(drawn) == 4  # two photos, two layers
    for (_, _, labels), options in drawn:
        colors = {}
        for text, color in zip(labels, options["colors"], strict=True):
            assert colors.setdefault(text.split(":")[0], color) == color
        assert len(set(colors.values())) == len(colors)
    rows = zip(photos.predictions.boxes, photos.experts, strict=True)
    by_row = {tuple(np.round(b, 6)): e for b, e in rows}
    for image, layer, _, _, x0, y0, x1, y1, label in figure.rows:
        experts = by_row[tuple(np.round([x0, y0, x1 - x0, y1 - y0], 6))]
        assert label == ", ".join(map(str, experts[int(layer[-1])]))
        assert image in photos.files
    photos.files = dict.fromkeys(photos.files, "none.png")
    assert token_pictures(photos, "") is None


def test_before_and_after_where_models_differ_most(photos, scene, rng):
    """The model before finds nothing at all in some images, and more in others."""
    after = photos
    objects = objects_of(after)
    found = verdicts(after, objects)
    before = scene(images=0)
    before.predictions = after.predictions[np.arange(len(after.predictions))]
    order = sorted(found, key=lambda i: -sum(found[i].found))
    blind = [i for i in order if sum(found[i].found)][:2]
    for image_id in blind:
        before.predictions.category_ids[before.predictions.image_ids == image_id] = -7
    before.names, before.files = after.names | {-7: "nothing"}, after.files
    figure = before_after(before, after, objects, ("dense", "x4"), "")
    if not blind:
        assert figure is None
        return
    assert {row[0] for row in figure.rows} == set(blind)
    assert {row[1] for row in figure.rows} == {"better"}
    assert f"{len(blind)} are better, 0 worse" in figure.reading
    for image_id in blind:
        truth = [row for row in figure.rows if row[0] == image_id and row[2] == "truth"]
        assert len(truth) == len(found[image_id].found)
        right = [row[-1] for row in figure.rows if row[0] == image_id and row[2] == "x4"]
        assert right == found[image_id].right
        assert not any(r[-1] for r in figure.rows if r[0] == image_id and r[2] == "dense")
    swapped = before_after(after, before, objects, ("x4", "dense"), "")
    assert {row[1] for row in swapped.rows} == {"worse"}
    assert before_after(after, after, objects, ("a", "b"), "") is None


def test_photos_with_rare_names_have_a_place_of_their_own(photos, scene):
    """Three images are better, and the first that differ least show a rare name."""
    after = photos
    objects = objects_of(after)
    objects.tail[:] = True
    found = verdicts(after, objects)
    images = [i for i in found if sum(found[i].found)]
    before = scene(images=0)
    before.predictions = after.predictions[np.arange(len(after.predictions))]
    before.predictions.category_ids[:] = -7
    before.names = {-7: "nothing"}
    figure = before_after(before, after, objects, ("dense", "x4"), "", count=1)
    kinds = dict((row[0], row[1]) for row in figure.rows) if images else {}
    assert list(kinds.values()) == ["better", "rare or unseen name"][: len(images)]
