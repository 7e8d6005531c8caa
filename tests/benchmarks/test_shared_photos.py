"""The benchmark runs as a user starts it, with a small model; sharing saves the backbone's runs."""

import json

import pytest
import shared_photos
import torch
from helpers.scripts import SMALL_NANO, run_script
from lib import tables
from lib.detectors import build, load_model_config


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(shared_photos.MODELS, "nano", (shared_photos.MODELS["nano"][0], 192))
    monkeypatch.setattr(
        shared_photos,
        "load_model_config",
        lambda path, overrides: load_model_config(path, [*overrides, *SMALL_NANO]),
    )


def test_a_ratio_for_each_model(tmp_path, small):
    asked = "--models nano --sentences 3 --repeats 2".split()
    text = run_script(shared_photos.main, *asked, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert f"{report['rows'][0]['speedup']:.2f} times as fast" in text
    assert "nano" in tables.shared_photos(report)


@torch.inference_mode()
def test_only_the_photos_are_shared(small, monkeypatch):
    """As many sentences are new in either case; the backbone sees one photo, or three."""
    asked, looked = shared_photos.Expressions(64, 3), []
    detector = build(load_model_config(shared_photos.MODELS["nano"][0], SMALL_NANO))
    extract = detector.extract_features
    monkeypatch.setattr(
        detector, "extract_features", lambda images: looked.append(len(images)) or extract(images)
    )
    said = []
    for shared in (True, False):
        asked.draw()
        said += [prompt.phrases for prompt in asked.sentences]
        detector.detect(asked.batch(shared))
    assert looked == [1, 3] and len({*map(tuple, said)}) == 6
