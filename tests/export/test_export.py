"""The command: a file is written, checked and read back by each runtime."""

import json
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from dynamic_dino import load_detector
from dynamic_dino.checkpoint.weights import export_weights
from dynamic_dino.config import without_downloads
from dynamic_dino.export import cli
from dynamic_dino.export.check import TOLERANCES, compare, generated_images
from dynamic_dino.export.detector import _write_torch, convert_to_openvino, load_source
from dynamic_dino.export.experts import EXPERTS, StaticMoE
from dynamic_dino.export.graph import StaticBlock
from dynamic_dino.export.onnx_format import store_in_half, write_onnx
from dynamic_dino.export.tensorrt import build_engine, obstacles
from dynamic_dino.files import configs_folder
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.modeling.swin import PaddedBlock
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.serving import predict
from dynamic_dino.serving.exported import KEY, ExportInfo
from helpers.routers import DIM, ROUTERS
from helpers.seeds import fresh_rng
from omegaconf import OmegaConf
from PIL import Image

TEXT = "red circle. blue square."


@pytest.fixture(scope="module")
def trained(nano_config, tmp_path_factory):
    """The recipe and the weights of one decoder layer with x4 experts, at 64 pixels, and the
    smallest backbone that there is."""
    folder = tmp_path_factory.mktemp("trained")
    config = nano_config.copy()
    ffn = config.model.decoder.layer.ffn
    config.model.decoder.layer.ffn = OmegaConf.create(
        {
            "_target_": "dynamic_dino.moe.layer.MoEFeedForward",
            "dim": ffn.dim,
            "hidden": ffn.hidden,
            "router": {
                "_target_": "dynamic_dino.moe.routers.SoftmaxRouter",
                "dim": ffn.dim,
                "num_experts": 4,
            },
        }
    )
    config.model.update(canvas=64, criterion=None, denoising=None)
    config.model.backbone.update(name="test_efficientnet", weights=None, frozen=False)
    config.model.enhancer.in_channels = [32, 48, 64]
    config.model.decoder.num_layers, config.inference.size = 1, 64
    config.model.query_selection.num_queries = 30
    LazyConfig.save(config, str(folder / "config.yaml"))
    export_weights(instantiate(config.model), folder / "weights.safetensors")
    return str(folder / "config.yaml"), str(folder / "weights.safetensors")


@pytest.mark.slow
def test_a_file_is_written_checked_and_read_back(trained, tmp_path):
    """One test, since tracing is what takes long."""
    recipe, weights = trained
    file, images = tmp_path / "model.onnx", generated_images(64, 3)
    arguments = [recipe, str(file), "--weights", weights, "--text", TEXT, "--batch", "dynamic"]
    assert cli.main([*arguments, "--max-detections", "25"]) == 0

    model = onnx.load(file)
    onnx.checker.check_model(model)
    kinds = {(node.domain, node.op_type) for node in model.graph.node}
    assert {("", "GridSample"), ("", "NonZero")} <= kinds
    assert not any(domain for domain, _ in kinds)
    about = ExportInfo.from_json({p.key: p.value for p in model.metadata_props}[KEY], file)
    assert about.names == ["red circle", "blue square"] and len(about.weights_sha256) == 64

    detector = load_detector(file)
    detector.batch_size = 3
    for image, found in zip(images, detector(images, threshold=0.0), strict=True):
        alone = detector(image, TEXT, threshold=0.0)
        np.testing.assert_allclose(found.scores, alone.scores, atol=1e-5)
        assert len(found) == 25 and set(found.phrases) <= {"red circle", "blue square"}

    photo = tmp_path / "photo.png"
    Image.fromarray(images[0]).save(photo)
    assert predict.main([str(photo), "--model", str(file), "--output", str(tmp_path)]) == 0
    (result,) = json.loads((tmp_path / "predictions.json").read_text())
    assert result["prompt"] == about.names
    for options in ({"weights": "x"}, {"accelerate": "compile"}):
        with pytest.raises(ValueError, match="is exported: it has its weights"):
            load_detector(file, **options)

    assert any("NonZero" in text for text in obstacles(file))
    with pytest.raises(
        ValueError, match="trtexec --onnx=.*model.onnx --saveEngine=.*x.engine --fp16"
    ):
        build_engine(file, tmp_path / "x.engine", True)

    half = tmp_path / "half.onnx"
    store_in_half(model)
    onnx.save(model, half)
    assert half.stat().st_size < 0.6 * file.stat().st_size
    full, rounded = (load_detector(f)(images[0], threshold=0.0).scores for f in (file, half))
    assert 0 < (full - rounded).abs().max() < 0.05

    convert_to_openvino(file, tmp_path / "folder", about)
    source = load_source(recipe, weights, text=TEXT, max_detections=25)
    allowed, prompt = TOLERANCES["float32"], Prompt.parse(TEXT)
    openvino = load_detector(tmp_path / "folder")
    found = compare(source.detector(), openvino, images[:2], prompt, allowed)
    assert found.within(allowed), found


class Layers(torch.nn.Module):
    """One after the other, what has operators of its own: every router, both forms of experts with
    such, and Swin's windows. Traced once, which takes long."""

    FORMS = {kind: EXPERTS[i % 2] for i, kind in enumerate(ROUTERS)}  # sparse, tiles, ...

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            StaticMoE(MoEFeedForward(DIM, 16, ROUTERS[kind](2, 2)), form)
            for kind, form in self.FORMS.items()
            if kind not in ("indicator", "straight-through", "instance")  # nothing of their own
        )
        self.swin = PaddedBlock(DIM, (7, 5), num_heads=2, window_size=3, shift_size=1)
        self.swin.__class__ = StaticBlock
        self.norm = torch.nn.LayerNorm(DIM)

    def forward(self, x, scene):
        x = self.swin(x).flatten(1, 2)
        for layer in self.layers:
            x, _ = layer(x, scene, self.norm)
        return x


class Corner(torch.nn.Module):
    """A detector of one box, the left half, whose score experts make of the picture's rows, so many
    tiles of them as there are images."""

    def __init__(self) -> None:
        super().__init__()
        layer = MoEFeedForward(DIM, 16, ROUTERS["parts"](2, 2))
        self.layer = StaticMoE(layer, "tiles")

    def forward(self, image, content):
        rows = image[..., :DIM].float().mean(1) / 255
        scores = self.layer(rows)[0].mean((1, 2)).sigmoid()[:, None]
        box = torch.tensor([0.25, 0.5, 0.5, 1.0]).expand(content.shape[0], 1, 4)
        return scores, torch.zeros_like(scores, dtype=torch.int64), box.clone()


def test_a_pt2_file_is_read_back(tmp_path):
    info = ExportInfo("corner", ["half"], 32, 1, None, ["image", "content"], 0.1, nms=0.5)
    image = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    inputs = {"image": image, "content": torch.ones(2, 2, dtype=torch.int64)}
    corner = Corner().eval()
    _write_torch(None, corner, inputs, info, tmp_path / "corner.pt2")
    detector = load_detector(tmp_path / "corner.pt2")
    assert (detector.threshold, detector.nms, detector.size) == (0.1, 0.5, 32)
    detector.batch_size = 5
    images = fresh_rng().integers(256, size=(5, 32, 32, 3), dtype=np.uint8)
    found = detector(list(images))
    expected = corner(torch.from_numpy(images).permute(0, 3, 1, 2), torch.full((5, 2), 32))[0]
    torch.testing.assert_close(torch.cat([f.scores for f in found]), expected[:, 0])
    assert found[0].phrases == ["half"]
    assert found[0].pred_boxes.tensor.tolist() == [[0, 0, 16, 32]]
    with pytest.raises(ValueError, match="dtype 'bfloat16' is for OpenVINO alone"):
        load_detector(tmp_path / "corner.pt2", dtype="bfloat16")
    with pytest.raises(FileNotFoundError, match="none.onnx doesn't exist"):
        load_detector(tmp_path / "none.onnx")


@pytest.mark.slow
def test_every_router_and_swin_in_onnx(tmp_path):
    layers, file = Layers().eval(), tmp_path / "layers.onnx"
    rows = torch.export.Dim("batch", max=64)
    inputs = {"x": torch.randn(2, 7, 5, DIM), "scene": torch.randn(2, DIM)}
    write_onnx(layers, inputs, ["y"], file, {name: {0: rows} for name in inputs})
    inputs = {"x": torch.randn(3, 7, 5, DIM), "scene": torch.randn(3, DIM)}
    with torch.no_grad():
        expected = layers(**inputs)
    feed = {name: value.numpy() for name, value in inputs.items()}
    (y,) = onnxruntime.InferenceSession(str(file)).run(None, feed)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    kinds = {text.split(",")[0].split(" (")[0] for text in obstacles(file)}  # those of "sparse"
    without = {f"input {name} without a fixed shape" for name in feed}
    assert kinds == {"operator NonZero", "ScatterND with a reduction", *without}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.onnx"], "what shall it look for.*--text-input"),
        (["a.onnx", "--text", "cow.", "--text-input"], "give one of them"),
        (["a.onnx", "--text", "cow.", "--size", "50"], "--size 50 is not a multiple of 32"),
        (["a.pt2", "--text", "cow.", "--half"], "--half is for onnx"),
        (["a.pt2", "--text", "cow.", "--experts", "sparse"], "torch has tiles and all"),
        (["a.engine", "--text", "cow.", "--batch", "dynamic"], "fixed shapes"),
        (["a.onnx", "--text", "cow.", "--int8", "photos"], "--int8 is for openvino"),
        (["a.onnx", "--text", "cow.", "--random-weights"], "instead of --weights"),
    ],
)
def test_what_cannot_be_exported_is_said(arguments, message, trained, tmp_path, capsys):
    recipe, weights = trained
    output = str(tmp_path / arguments[0])
    assert cli.main([recipe, output, "--weights", weights, *arguments[1:]]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_random_weights(trained):
    recipe, _ = trained
    sources = [load_source(recipe, text=TEXT, random_weights=True) for _ in range(2)]
    states = [source.model.state_dict() for source in sources]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert sources[0].weights_sha256 is None and sources[0].name.endswith("random weights")
    edge = LazyConfig.load(str(configs_folder() / "moe_tuning/dynamic_dino_x16_top2.py")).model
    node = without_downloads(edge)
    assert node.backbone.weights is None and node.text_encoder.weights is False
    assert edge.backbone.weights == "timm" and node.text_encoder.max_tokens == 256
