"""Every peer runs, built as the benchmark builds it, but small."""

import functools
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from lib import tables

SMALL_SWIN = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
SMALL = {"num_queries": 9, "encoder_layers": 1, "decoder_layers": 2}
YOLO = {"yolo-world-s", "yolo-world-l", "yoloe-11l"}
SMALL_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}


@pytest.fixture
def peers():
    import peers

    return peers


@pytest.fixture
def small(peers, monkeypatch):
    """The same classes of models with few and narrow layers, and nano in Edge's place."""
    bert = transformers.BertConfig(**SMALL_TEXT, num_attention_heads=2)
    clip = transformers.CLIPTextConfig(**SMALL_TEXT, num_attention_heads=2)
    for name in ("GroundingDinoConfig", "MMGroundingDinoConfig"):
        config = functools.partial(getattr(transformers, name), **SMALL, text_config=bert)
        monkeypatch.setattr(peers.transformers, name, config)
    monkeypatch.setattr(
        peers.transformers,
        "OmDetTurboConfig",
        functools.partial(
            transformers.OmDetTurboConfig,
            num_queries=9,
            decoder_num_layers=1,
            text_config=clip,
            text_projection_in_dim=32,
            class_embed_dim=32,
            text_projection_out_dim=32,
        ),
    )
    for name in ("SWIN_TINY", "SWIN_BASE"):
        monkeypatch.setattr(peers, name, getattr(peers, name) | SMALL_SWIN)
    load, nano = peers.load_model_config, "configs/moe_tuning/nano_x16_stamps.py"
    recipes = {peers.GDINO_TINY: "configs/pretrain/gdino_nano_stamps.py"}
    monkeypatch.setattr(peers, "load_model_config", lambda path: load(recipes.get(path, nano)))
    for name in YOLO:
        build = peers.MODELS[name]
        config = build.keywords["config"].replace("8s", "8n").replace("8l", "8n")
        monkeypatch.setitem(
            peers.MODELS, name, functools.partial(build, config=config.replace("11l", "11n"))
        )
    return peers


def skip_without_ultralytics():
    if not importlib.util.find_spec("ultralytics"):  # its import changes others
        pytest.skip("pip install --no-deps ultralytics")


def measured(peers, path, *arguments):
    peers.main(["--device", "cpu", "--repeats", "2", "--json", str(path), *arguments])
    return json.loads(path.read_text())


@pytest.mark.slow
def test_every_peer_runs_beside_ours(small, tmp_path, capsys):
    report = measured(small, tmp_path / "new" / "peers.json", "--size", "96", "128")
    assert {*report["failed"]} == (set() if importlib.util.find_spec("ultralytics") else YOLO)
    rows = report["rows"]
    ways = {
        name: [r["text"] for r in rows if r["model"] == name]
        for name in small.MODELS
        if name not in report["failed"]
    }
    yolo = ways.keys() & YOLO
    both = ["encoded", "cached"]
    assert ways == {
        "edge-dense": both,
        "edge-x16": both,
        "grounding-dino-tiny": ["encoded"],
        "grounding-dino-tiny-ours": both,
        "grounding-dino-base": ["encoded"],
        "mm-grounding-dino-tiny": ["encoded"],
        "omdet-turbo-tiny": both,
        **dict.fromkeys(yolo, ["cached"]),
    }
    for row in rows:
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["fps"] == pytest.approx(1e3 / row["median_ms"])
        assert row["ratio"] > 0 and row["parameters"] > 0
        assert (row["ratio"] == 1) == ((row["model"], row["text"]) == small.REFERENCE)
    assert report["settings"]["size"] == [96, 128]
    assert report["versions"]["transformers"] and report["machine"]
    text = capsys.readouterr().out
    assert "96 x 128, batch 1, float32, 10 names" in text and "1.00 x edge-x16" in text


def test_a_peer_that_fails_is_named_and_the_others_go_on(small, tmp_path, capsys, monkeypatch):
    def broken(size, device):
        raise RuntimeError("no such layer\nand more of it")

    monkeypatch.setitem(small.MODELS, "omdet-turbo-tiny", broken)
    arguments = ["--size", "96", "--models", "omdet-turbo-tiny", "mm-grounding-dino-tiny"]
    report = measured(small, tmp_path / "peers.json", *arguments)
    assert report["failed"] == {"omdet-turbo-tiny": "RuntimeError: no such layer"}
    assert [row["model"] for row in report["rows"]] == ["mm-grounding-dino-tiny"]
    assert "ratio" not in report["rows"][0]  # nothing of ours to compare with
    assert "omdet-turbo-tiny doesn't run: RuntimeError: no such layer" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(YOLO))
def test_without_ultralytics_the_command_that_brings_it_is_named(
    peers, name, tmp_path, monkeypatch
):
    for module in [m for m in sys.modules if m.partition(".")[0] == "ultralytics"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    report = measured(peers, tmp_path / "peers.json", "--size", "64", "--models", name)
    assert not report["rows"]
    assert "pip install --no-deps ultralytics" in report["failed"][name]


def test_ultralytics_changes_nothing_of_others(peers):
    """In a process of its own, where it is imported for the first time."""
    skip_without_ultralytics()
    code = """
import peers, numpy, torch
from PIL import Image
def state():
    text = str(numpy.full(2, 1 / 3)) + str(torch.full((2,), 1e-5))
    return Image.open, torch.save, numpy.get_printoptions(), text
before = state()
peers.ultralytics_tasks()
assert state() == before
"""
    run = {"cwd": Path(peers.__file__).parent, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **run)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(YOLO))
def test_each_name_gets_a_score_of_its_own(small, name):
    skip_without_ultralytics()
    candidate = small.MODELS[name]((64, 96), "cpu")
    with torch.inference_mode():
        found, _ = candidate.model(**candidate.inputs)
    names, places = 10, (8 * 12) + (4 * 6) + (2 * 3)
    assert found.shape == (1, 4 + names, places)
    assert 0 < found[0, 4:].min() <= found[0, 4:].max() < 1


def test_times_are_those_of_the_clock_that_was_asked_for(small, tmp_path, monkeypatch):
    ticks = itertools.count(step=3)  # seconds
    monkeypatch.setitem(small.CLOCKS, "process", lambda: next(ticks))
    arguments = ["--size", "64", "--models", "edge-x16", "--clock", "process"]
    report = measured(small, tmp_path / "peers.json", *arguments)
    assert [row["median_ms"] for row in report["rows"]] == [3000, 3000]
    assert report["settings"]["clock"] == "process"
    with pytest.raises(SystemExit):
        small.main(["--device", "cuda", "--clock", "process"])


def test_ours_may_not_fail(small, tmp_path, monkeypatch):
    monkeypatch.setitem(small.MODELS, "edge-x16", lambda size, device: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measured(small, tmp_path / "peers.json", "--models", "edge-x16")


@pytest.mark.parametrize("name", ["edge-x16", "grounding-dino-tiny-ours", "omdet-turbo-tiny"])
def test_a_forgotten_text_is_encoded_again(small, name):
    """The text encoders count their runs: once when forgotten, never when cached."""
    candidate = small.MODELS[name]((96, 96), "cpu")
    model = candidate.model
    body = model.text_encoder.body if name in small.OURS else model.language_backbone.model
    runs = []
    body.register_forward_hook(lambda *_: runs.append(1))
    steps = small.prepare(candidate, "cpu", torch.float32)
    runs.clear()
    steps["cached"]()
    assert not runs
    steps["encoded"]()
    assert runs
    runs.clear()
    steps["cached"]()
    assert not runs


def test_grounding_dino_is_as_large_as_published(peers):
    """172M, as its model card says, so the config is that of the published model; ours has the
    same network."""
    for name in ("grounding-dino-tiny", "grounding-dino-tiny-ours"):
        candidate = peers.MODELS[name]((64, 64), "cpu")
        assert candidate.parameters == pytest.approx(172e6, rel=0.005)


def test_the_command_names_the_models_to_choose_from(peers, capsys):
    with pytest.raises(SystemExit):
        peers.main(["--models", "yolo"])
    message = capsys.readouterr().err
    assert "choose from" in message and "omdet-turbo-tiny" in message


def test_what_is_said_of_the_peers_is_what_was_measured():
    report = json.loads((tables.RESULTS / "cpu/peers.json").read_text())
    times = {(row["model"], row["text"]): row["median_ms"] for row in report["rows"]}
    text = " ".join((tables.PROJECT / "docs/speed.md").read_text().split())
    theirs, ours, edge = (
        times[name, "encoded"]
        for name in ("grounding-dino-tiny", "grounding-dino-tiny-ours", "edge-x16")
    )
    assert f"grounding-dino-tiny {theirs / ours:.1f} times as fast as transformers" in text
    assert f"Edge x16 is {ours / edge:.2f} times as fast, not {theirs / edge:.2f}" in text
    world_l, yoloe, world_s = (
        f"{times[name, 'cached'] / times['edge-x16', 'cached']:.2f}"
        for name in ("yolo-world-l", "yoloe-11l", "yolo-world-s")
    )
    assert f"YOLO-World-L {world_l} of Edge x16's time, YOLOE-11L {yoloe}" in text
    assert f"YOLO-World-S {world_s}." in text
