"""Routers on domains left out: what is left out stays out, and what is chosen follows the rule."""

import json
from collections import Counter

import domains
import numpy as np
import pytest
import torch
from helpers.scripts import run_script
from helpers.seeds import fresh_rng
from lib import crops as crops_module
from lib import tables
from lib.crops import Crop, at_most, read_crops, shared_names, squares
from lib.routed_classifier import classifier
from PIL import Image

COLOURS = {
    "rose": (200, 30, 30),
    "leaf": (30, 180, 40),
    "sky": (40, 60, 220),
    "sun": (230, 220, 40),
}


def crop(domain, name, image="a.jpg"):
    return Crop(domain, name, image, (0, 0, 40, 40))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three sets of coloured squares, each in a light of its own; sun only two of them have."""
    folder, rng = tmp_path_factory.mktemp("data"), fresh_rng()
    for light, domain in enumerate(("one", "two", "three")):
        names = list(COLOURS)[: 3 + (light < 2)]
        (folder / "photos" / domain / "images").mkdir(parents=True)
        images, annotations = [], []
        for i in range(10):
            pixels = rng.integers(0, 40 + 30 * light, (100, 200, 3))
            for j, name in enumerate(names):
                x, side = 50 * j, 40 - 20 * (i == 0 and j == 0)  # the first is too small
                pixels[10 : 10 + side, x : x + side] = COLOURS[name]
                box = {"id": 10 * i + j + 1, "category_id": j, "bbox": [x, 10, side, side]}
                annotations.append({"image_id": i, "area": side**2, "iscrowd": 0, **box})
            picture = Image.fromarray(pixels.astype(np.uint8))
            picture.save(folder / "photos" / domain / "images" / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": 200, "height": 100})
        categories = [{"id": j, "name": name} for j, name in enumerate(names)]
        found = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "photos" / domain / "train.json").write_text(json.dumps(found))
    return folder


def test_names_and_domains_stay_by_the_rule():
    many = [
        *[crop(d, n) for d in "abc" for n in ("cat", "dog", "cow") for _ in range(10)],
        *[crop("d", n) for n in ("dog", "fox") for _ in range(10)],  # one shared name: no domain
        *[crop(d, "fox") for d in "ab" for _ in range(10)],  # so fox is of two domains only
        *[crop("c", "hen") for _ in range(9)],
    ]
    found = shared_names(many)
    assert found == {d: {"cat": 10, "cow": 10, "dog": 10} for d in "abc"}
    assert set(shared_names(many, names=2)) == {*"abcd"}
    with pytest.raises(ValueError, match="4 sets .* in common"):
        shared_names(many, domains=4)
    few = at_most(many, 4)
    assert set(Counter((c.domain, c.name) for c in few).values()) == {4}
    assert few == at_most(many, 4)


def test_crops_are_what_the_boxes_hold(root):
    found = read_crops(root)
    assert Counter(c.domain for c in found) == {"one": 39, "two": 39, "three": 29}
    for one, pixels in zip(found, squares(found, root, 32), strict=True):
        assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8
        difference = pixels.int() - torch.tensor(COLOURS[one.name])[:, None, None]
        assert difference.abs().max() <= 1  # resizing rounds
    with pytest.raises(FileNotFoundError, match="dynamic_dino.data.photos"):
        read_crops(root / "photos")


def test_no_image_trains_and_chooses_and_the_domain_left_out_does_neither():
    rng = fresh_rng()
    drawn = [(str(rng.choice([*"abc"])), str(rng.integers(20))) for _ in range(200)]
    many = [crop(domain, "cat", domain + image) for domain, image in drawn]
    training, choosing, test = domains.split(many, "b", seed=int(rng.integers(100)))
    held = [i for rows in choosing.values() for i in rows]
    assert sorted(training + held + test) == list(range(200))
    assert {many[i].domain for i in test} == {"b"} and choosing.keys() == {"a", "c"}
    assert all({many[i].domain for i in rows} == {domain} for domain, rows in choosing.items())
    assert {many[i].domain for i in training} == {"a", "c"}
    assert not {many[i].image for i in training} & {many[i].image for i in held}
    steps = domains.balanced(domains.by_domain(many, training), 30, 9, seed=1)
    for step in steps:
        assert Counter(many[i].domain for i in step) == {"a": 4, "c": 4}
    assert {i for step in steps for i in step} == {*training}


def test_every_row_starts_as_the_base():
    torch.manual_seed(int(fresh_rng().integers(10**6)))
    base = domains.Base(channels=12, cells=4, classes=3).eval()
    features = torch.randn(5, 4, 12)
    mask = torch.ones(5, 4, dtype=torch.long)
    for row in domains.ROWS.values():
        model = classifier(base.bert, row, 3).eval()
        model.head.load_state_dict(base.head.state_dict())
        logits, routings = model(base.embed(features), mask)
        torch.testing.assert_close(logits, base(features), rtol=1e-4, atol=1e-4)
        assert len(routings) == (2 if row.router else 0)
        units = [p.numel() for n, p in model.encoder.ffns.named_parameters() if is_matrix(n)]
        copies = 1 if row.title == "dense" else domains.COPIES
        assert sum(units) == 2 * copies * 2 * domains.DIM * domains.HIDDEN


def is_matrix(name):
    return name.endswith(("experts.w1", "experts.w2", "linear1.weight", "linear2.weight"))


def test_a_run_is_kept_and_its_features_too(root, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    monkeypatch.setattr(crops_module, "SMALL", 0)
    monkeypatch.setattr(domains, "DIM", 32)
    monkeypatch.setattr(domains, "HIDDEN", 48)
    options = "--device cpu --threads 1 --size 64 --base-steps 2 --steps 4 --points 2 --batch 12"
    places = ["--json", tmp_path / "d.json", "--plot", tmp_path / "d.png", "--work", tmp_path]
    text = run_script(domains.main, *options.split(), *places, "--seeds", 0)
    report = json.loads((tmp_path / "d.json").read_text())
    assert {d: sum(n.values()) for d, n in report["objects"].items()} == dict.fromkeys(
        ("one", "three", "two"), 30
    )
    assert report["base_objects"] == {"one": 10, "two": 10}
    assert text.count("without ") == 3 and (tmp_path / "d.png").is_file()
    kept, first = sorted(tmp_path.glob("*.pt")), report["seeds"]["0"]["one"]
    assert len(kept) == 2 and first.keys() == domains.ROWS.keys()
    for row in first.values():
        assert [point["step"] for point in row["curve"]] == [2, 4]
        assert all(0 <= point["validation"] <= 100 for point in row["curve"])
    whole = first["dense"]["ffn_gmacs"]
    assert first["wide"]["ffn_gmacs"] == pytest.approx(8 * whole)
    for name, experts in (("top1", 8), ("top2", 16), ("top4", 32)):
        router = experts / (2 * domains.HIDDEN)
        assert first[name]["ffn_gmacs"] == pytest.approx((1 + router) * whole)
        assert first[name]["train_experts_per_token"] == pytest.approx(experts / 8)
    monkeypatch.setattr(crops_module, "squares", None)  # features are read
    again = run_script(domains.main, *options.split(), *places, "--seeds", 0)
    assert "without" not in again and again.splitlines()[-4:] == text.splitlines()[-4:]
    with pytest.raises(SystemExit, match="delete it to start anew"):
        run_script(domains.main, *options.split(), *places, "--lr", 0.5)


def test_table_takes_the_point_that_training_domains_choose():
    def row(extra, early, late):
        points = [
            {"accuracy": 50.0 + extra, "validation": early},
            {"accuracy": 90.0, "validation": late},
        ]
        taken = {"experts_per_token": [2.0, 3.0]} if extra else {}
        curve = [point | taken for point in points]
        return {"curve": curve, "train_experts_per_token": 1 + extra, "ffn_gmacs": 2.0 + extra}

    seeds = {
        seed: {
            "x": {"dense": row(0, 80, 70), "dynmoe": row(2, 80, 70)},
            "y": {"dense": row(0, 80, 80), "dynmoe": row(2, 80, 80)},
        }
        for seed in ("0", "1")
    }
    text = tables.domains({"seeds": seeds, "objects": {"x": {"cat": 3}, "y": {"cat": 4, "dog": 1}}})
    assert "2 names, 8 in all" in text and "x (3) | y (5)" in text
    assert "| dense | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 1.0 | - | 1.00 |" in text
    assert "| +2.0 ± 0.0 | +2.0 ± 0.0 | +2.0 ± 0.0 | 3.0 | 2.0 / 3.0 | 2.00 |" in text
