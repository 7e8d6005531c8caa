"""The benchmark of public weights on small models: equal detections first, then times."""

import functools
import json

import numpy as np
import pytest
import torch
import transformers
from helpers.seeds import fresh_rng
from PIL import Image

SWIN = dict(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 2], out_indices=[2, 3, 4])
BERT = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
SMALL = dict(
    num_queries=30,
    d_model=64,
    encoder_layers=1,
    decoder_layers=2,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    text_config=transformers.BertConfig(**BERT),
)


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """With models of the same kind, but small; photos of noise in tmp_path/photos."""
    import public_weights

    for name in ("GroundingDinoConfig", "MMGroundingDinoConfig"):
        small = functools.partial(getattr(transformers, name), **SMALL)
        monkeypatch.setattr(public_weights.transformers, name, small)
    models = {"tiny": (False, SWIN), "mm-tiny": (True, SWIN)}
    monkeypatch.setattr(public_weights, "MODELS", models)
    rng = fresh_rng()
    (tmp_path / "photos").mkdir()
    for i, size in enumerate([(60, 90), (80, 50)]):
        noise = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        noise.resize((size[1] * 2, size[0] * 2)).save(tmp_path / f"photos/{i}.png")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return public_weights


def arguments(path, *more) -> list[str]:
    own = ["--device", "cpu", "--repeats", "2", "--size", "96", "160", "--images", "photos"]
    return [*own, "--names", "dog. traffic light.", "--json", str(path), *more]


@pytest.mark.slow
def test_same_detections_then_times(benchmark, tmp_path, capsys):
    path = tmp_path / "new/public_weights.json"
    assert benchmark.main(arguments(path, "--models", "tiny", "mm-tiny")) == 0
    report = json.loads(path.read_text())
    assert list(report["models"]) == ["tiny", "mm-tiny"] and report["photos"] == [
        [180, 120],
        [100, 160],
    ]
    for model in report["models"].values():
        compared = model["comparison"]
        assert compared["detections"] == 2 * 60
        assert compared["detections"] * benchmark.SHARE <= compared["twins"] <= 2 * 60
        assert compared["largest_score"] < benchmark.SCORES
        assert compared["largest_pixels"] < benchmark.PIXELS
        keys = [(row["library"], row["part"], row["text"]) for row in model["rows"]]
        assert len(set(keys)) == 6
        for row in model["rows"]:
            assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
            assert (row["library"] == "transformers") <= (row["speedup"] == 1)
    output = capsys.readouterr().out
    assert "2 photos of photos" in output and "detections are the same" in output
    assert str(tmp_path) not in json.dumps(report["settings"]["images"])


@pytest.mark.slow
def test_other_detections_end_it(benchmark, tmp_path, capsys, monkeypatch):
    load = benchmark.load_twins

    def load_others(*given):
        twins = load(*given)
        with torch.no_grad():
            for parameter in twins.theirs.model.decoder.parameters():
                parameter.mul_(1.5)
        return twins

    monkeypatch.setattr(benchmark, "load_twins", load_others)
    path = tmp_path / "report.json"
    assert benchmark.main(arguments(path)) == 1 and not path.exists()
    assert "not the same, so nothing is measured" in capsys.readouterr().out


@pytest.mark.slow
def test_weights_of_ones_own_and_half_precision(benchmark, tmp_path):
    benchmark.save_random(tmp_path / "hub", *benchmark.MODELS["tiny"])
    path, weights = tmp_path / "report.json", f"hf:{tmp_path / 'hub'}"
    assert benchmark.main(arguments(path, "--weights", weights, "--dtype", "bfloat16")) == 0
    report = json.loads(path.read_text())
    assert list(report["models"]) == [weights] and report["settings"]["threshold"] == 0.25


def test_a_picture_of_the_repository_where_there_are_no_photos(benchmark, tmp_path):
    [photo], what = benchmark.photos_of(None, 3)
    assert what == "shipped_photos.jpg" and photo.width > 500
    assert [p.size for p in benchmark.photos_of(["photos"], 1)[0]] == [(180, 120)]
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        benchmark.photos_of(["nothing-here"], 3)
