"""A closed-set detector in use: asked for everything, for something, and for what it can't know."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from dynamic_dino import load_detector
from dynamic_dino.checkpoint.weights import export_weights
from dynamic_dino.config import load_config
from dynamic_dino.data.synthetic.drawn import NAMES
from dynamic_dino.serving import predict
from dynamic_dino.serving.inference import Detector
from helpers.seeds import fresh_rng
from PIL import Image

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs/himoe/dino_nano_drawn.py"


@pytest.fixture(scope="module")
def trained():
    model = instantiate(load_config(RECIPE).model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.half().float())  # as they are exported
    return model.eval()


@pytest.fixture(scope="module")
def weights(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("closed") / "weights.safetensors"
    export_weights(trained, path)
    return path


def image() -> np.ndarray:
    return fresh_rng().integers(0, 256, (100, 128, 3), dtype=np.uint8)


def test_all_classes_or_some(trained, weights):
    detector, pixels = load_detector(RECIPE, weights, "cpu", threshold=0.0), image()
    assert detector.all_classes().phrases == list(NAMES)
    found = detector(pixels)
    assert len(found) == 100 and set(found.phrases) <= set(NAMES)
    assert found.phrases == [NAMES[i] for i in found.pred_classes]
    expected = trained([detector._sample(pixels, detector.all_classes())])[0]["instances"]
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-4)

    some = detector([pixels, image()], ["red circle", NAMES[7]])
    assert {*some[0].phrases, *some[1].phrases} <= {"red circle", NAMES[7]}
    with pytest.raises(ValueError, match="'red circel' is none of the 12 classes.*'red circle'"):
        detector(pixels, "red circel. blue square.")
    low = load_detector(RECIPE, weights, "cpu", threshold=0.0, dtype="bfloat16")
    assert len(low(pixels)) == 100


def test_an_open_vocabulary_must_be_asked():
    with pytest.raises(ValueError, match="nothing to look for: give phrases"):
        Detector(torch.nn.Identity(), 32)(image())


@pytest.mark.slow
def test_predict(weights, tmp_path, capsys):
    Image.fromarray(image()).save(tmp_path / "a.png")
    to = ["--output", str(tmp_path / "out")]
    model = ["--config-file", str(RECIPE), "--weights", str(weights), "--threshold", "0"]
    assert predict.main([str(tmp_path / "a.png"), *model, *to]) == 0
    [result] = json.loads((tmp_path / "out/predictions.json").read_text())
    assert result["prompt"] == list(NAMES) and len(result["detections"]) == 100
    capsys.readouterr()
    for arguments, message in (
        ([*model, "--text", "zebra."], "'zebra' is none of the 12 classes"),
        (["--model", "nano-dense"], "nothing to look for: give phrases (predict.py: --text)"),
    ):
        assert predict.main([str(tmp_path / "a.png"), *arguments, *to]) == 2
        assert message in capsys.readouterr().err
