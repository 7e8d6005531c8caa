"""What the page shows: of one look, at any threshold, and the experts of each detection's query."""

import importlib.util

import numpy as np
import pytest
from dynamic_dino import load_detector
from dynamic_dino.page.cli import loaders, parser
from dynamic_dino.page.looking import LOWEST, Models
from dynamic_dino.serving.shipped import DEFAULT_MODEL, SHIPPED_MODELS
from helpers.browser import find_browser, open_tab
from PIL import Image


@pytest.fixture(scope="module")
def models():
    return Models({name: lambda name=name: load_detector(name, pack="never") for name in NAMES})


NAMES = ("nano-x16", "nano-dense")


def test_a_look_shows_what_the_detector_finds_and_who_saw_it(models, monkeypatch):
    picture = np.random.default_rng(1).integers(0, 255, (60, 80, 3), np.uint8)
    look = models.look("nano-x16", picture, "cow.\n\nhorse")
    detector = models.detector("nano-x16")
    found = detector(picture, ["cow", "horse"], LOWEST)
    assert len(found) and look.detections.phrases == found.phrases
    assert look.detections.scores.tolist() == found.scores.tolist()
    assert not detector.model.return_routings and not detector.model._forward_hooks

    # The experts are those that the model tells of the query of each detection.
    monkeypatch.setattr(detector.model, "return_routings", True)
    seen = []
    hook = detector.model.register_forward_hook(lambda *call: seen.append(call[-1][0]))
    detector(picture, ["cow", "horse"], LOWEST)
    hook.remove()
    raw, routings = seen[0]["instances"], seen[0]["routings"]
    assert look.layers == [f"decoder {i}" for i in range(len(routings))]
    for box, score, experts in zip(
        look.detections.pred_boxes.tensor, look.detections.scores, look.experts, strict=True
    ):
        [query, *_] = raw.queries[
            (raw.pred_boxes.tensor == box).all(1) & (raw.scores == score)
        ].tolist()
        taken = [tuple(sorted(r.expert_ids[query].tolist())) for r in routings]
        assert experts == taken

    for threshold in (LOWEST, float(found.scores.median()), 1):
        rows = look.rows(threshold)
        assert len(rows) == int((found.scores >= threshold).sum())
        assert all(len(row) == len(look.headers()) for row in rows)
        assert look.summary(threshold).startswith(f"{len(rows)} found")
    assert "lower the threshold" in look.summary(1)
    drawn = look.drawn(LOWEST)
    assert drawn.shape == (480, 640, 3) and (drawn != look.drawn(1)).any()

    dense = models.look("nano-dense", picture, "cow")
    assert dense.layers == [] and len(dense.headers()) == 3


def test_what_cannot_be_looked_at_is_said(models, tmp_path):
    picture = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="no picture yet"):
        models.look("nano-x16", None, "cow.")
    with pytest.raises(ValueError, match="no names yet"):
        models.look("nano-x16", picture, " .\n. ")
    with pytest.raises(ValueError, match="unknown model 'x': choose one of nano-x16, nano-dense"):
        models.look("x", picture, "cow")
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="a.jpg"):
        models.look("nano-x16", tmp_path / "a.jpg", "cow")


def test_the_list_of_models_begins_with_what_was_asked_for():
    names = list(loaders(parser().parse_args([])))
    assert names[0] == DEFAULT_MODEL and sorted(names) == sorted(SHIPPED_MODELS)
    own = ["--config-file", "mine.py", "--weights", "mine.pth"]
    assert list(loaders(parser().parse_args(own))) == ["mine.py", *SHIPPED_MODELS]
    args = parser().parse_args([*own, "--device", "cpu"])
    shipped = loaders(args)["nano-dense"].args[0]
    assert (shipped.model, shipped.config_file, shipped.weights) == ("nano-dense", None, None)
    assert shipped.device == "cpu"


def test_in_a_browser(models, tmp_path, monkeypatch):
    """Upload, type, detect, move the slider: another look only where one was asked for."""
    if find_browser() is None or importlib.util.find_spec("gradio") is None:
        pytest.skip("no browser, playwright or gradio: BROWSER=1 make test brings them")
    from dynamic_dino.page.app import launch, make_page

    pixels = np.random.default_rng(1).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(picture := tmp_path / "a.png")
    looks, look = [], models.look
    monkeypatch.setattr(models, "look", lambda *asked: looks.append(look(*asked)) or looks[-1])
    models.detector("nano-x16")
    page = make_page(models, LOWEST)
    _, address, _ = launch(page, "127.0.0.1", None, block=False)
    try:
        with open_tab(address, 1200) as (tab, console):
            detect = tab.get_by_role("button", name="Detect")
            detect.click()
            tab.get_by_text("There is no picture yet").wait_for()
            tab.locator("input[type=file]").first.set_input_files(picture)
            tab.locator("img[src$='a.png']").wait_for()
            tab.get_by_label("Names, separated by full stops").fill("cow. horse.")
            detect.click()
            tab.get_by_text("found in").wait_for()
            [found] = looks
            assert tab.get_by_text(found.summary(LOWEST)).count() == 1
            heads = [head.strip(" \n⋮") for head in tab.locator("th").all_text_contents()]
            assert heads[: len(found.headers())] == found.headers() and "decoder 0" in heads
            # Gradio draws rows as they come into view; its first has of each column a value.
            columns = zip(*found.rows(LOWEST), strict=True)
            cells = [cell.strip() for cell in tab.locator("td").all_text_contents()]
            for cell, column in zip(cells, columns, strict=False):
                assert cell in [*map(str, column)]
            assert len(cells) >= len(found.headers())
            drawn = tab.locator("img[src$='image.png']")
            before = drawn.get_attribute("src")
            level = round(float(found.detections.scores[0]) - 0.005, 2)
            tab.get_by_label("number input for Lowest score shown").fill(str(level))
            tab.get_by_text(found.summary(level)).wait_for()
            assert drawn.get_attribute("src") != before and len(looks) == 1
            # A stream of Gradio's own client says so when it is closed.
            assert set(console) <= {"Method not implemented."}
    finally:
        page.close()
