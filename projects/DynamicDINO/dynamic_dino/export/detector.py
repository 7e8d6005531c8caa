"""A model of this project to a file for another runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import sha256_of_file
from ..modeling.detector import OpenVocabularyDetector
from ..modeling.prompt import Prompt
from ..modeling.text import TextEncoder
from ..modeling.vocabulary import ClassVocabulary
from ..moe.layer import MoEFeedForward
from ..serving.exported import (
    GRAPH,
    KEY,
    SIDECAR,
    TEXT,
    TOKENIZER,
    ExportInfo,
    TextSlots,
    text_file,
    tokenizer_file,
)
from ..serving.inference import Detector, find_files, load_model, random_model
from ..serving.shipped import defaults_of
from ..sources import is_hub_spec
from .graph import DetectorGraph, TextGraph, static_copy
from .onnx_format import write_onnx

FORMATS = ("onnx", "openvino", "torch", "tensorrt")
DEFAULT_EXPERTS = {"onnx": "sparse", "openvino": "sparse", "torch": "tiles", "tensorrt": "tiles"}
DIVISOR = 32  # of the canvas: the stride of the coarsest map of a backbone
DETECTIONS = ("scores", "phrases", "boxes")
SPECIAL = ("cls_token", "sep_token", "pad_token", "unk_token", "mask_token")


@dataclass
class Source:
    """A model to export, as it runs in PyTorch on the canvas that the export shall have.

    Args:
        model: with `size` as its canvas.
        prompt: what it is asked for; the names to bake in, or examples of an open text.
        slots: of the text inputs; None where the names are baked in.
    """

    model: OpenVocabularyDetector
    name: str
    size: int
    prompt: Prompt
    slots: TextSlots | None
    threshold: float
    nms: float | None
    weights_sha256: str | None

    def detector(self) -> Detector:
        return Detector(self.model, self.size, "cpu", self.threshold, nms=self.nms)

    @property
    def has_experts(self) -> bool:
        return any(isinstance(m, MoEFeedForward) for m in self.model.modules())


def load_source(
    model: str,
    weights: str | None = None,
    size: int | None = None,
    text: str | None = None,
    text_input: int | None = None,
    max_detections: int | None = None,
    random_weights: bool = False,
) -> Source:
    """Loads a model for its export.

    Args:
        model, weights: see `load_detector`.
        random_weights: instead of the model's own, see `random_model`.
        size: side of the square canvas in pixels, a multiple of 32; default: the recipe's.
        text: the names to bake in, as "cow. horse."; default, of a closed set: all its classes.
        text_input: instead, how many tokens of text an input shall hold; 0: as many as suit the
            model.
        max_detections: that are returned of an image; default: the recipe's.

    Raises:
        FileNotFoundError, ValueError: naming the argument, and what to give instead.
    """
    if random_weights and weights:
        raise ValueError("--random-weights are instead of --weights: give one of them")
    detector, cfg = (
        random_model(model) if random_weights else load_model(model, weights, "cpu", pack="never")
    )
    if not isinstance(detector, OpenVocabularyDetector):
        raise ValueError(
            f"{model} is a {type(detector).__name__}: only an OpenVocabularyDetector has an export"
        )
    edge = cfg.inference.size
    edge = edge if isinstance(edge, int) else min(edge)
    size = size or detector.canvas or -(-edge // DIVISOR) * DIVISOR
    if size < DIVISOR or size % DIVISOR:
        raise ValueError(f"--size {size} is not a multiple of {DIVISOR}, as the canvas must be")
    detector.canvas, detector.return_routings = size, False
    detector.max_detections_per = "image"
    if max_detections is not None:
        detector.max_detections = max_detections
    slots = None
    encoder = detector.text_encoder
    if text_input is not None:
        if isinstance(encoder, ClassVocabulary):
            raise ValueError(
                f"{model} is a closed-set detector, which reads no text: leave out --text-input, "
                "and all its classes are exported, or name some with --text"
            )
        slots = text_slots(encoder, text_input, detector.max_phrases)
        detector.max_phrases, encoder.max_tokens = slots.phrases, slots.tokens
    if text:
        prompt = Prompt.parse(text)
    elif isinstance(encoder, ClassVocabulary):
        prompt = Prompt.from_phrases(encoder.names)
    elif slots is None:
        raise ValueError(
            "what shall it look for? Give names with --text 'cow. horse.', which become part of "
            "the file, or --text-input for a file that takes any"
        )
    else:
        prompt = Prompt.from_phrases(["cow", "red circle", "yellow triangle"])
    return Source(
        detector,
        f"{model}, random weights" if random_weights else str(model),
        size,
        prompt,
        slots,
        *defaults_of(str(model), weights),
        None if random_weights else _checksum(model, weights),
    )


def text_slots(encoder: TextEncoder, tokens: int, max_phrases: int | None) -> TextSlots:
    """Slots for so many tokens; 0: for as many as the encoder and the detector take."""
    if encoder.pooled:  # one token per phrase
        tokens = tokens or max_phrases or 40
        phrases = tokens
    else:
        tokens = tokens or encoder.max_tokens
        phrases = min((tokens - 2) // 2, max_phrases or tokens)  # a name and its full stop
    if phrases < 1:
        raise ValueError(f"--text-input {tokens} has no room for a name: give 16 or more")
    special = {name: getattr(encoder.tokenizer, name) for name in SPECIAL}
    special = {name: str(token) for name, token in special.items() if token is not None}
    return TextSlots(tokens, phrases, encoder.pooled, special, encoder.positions)


def _checksum(model: str, weights: str | None) -> str | None:
    if is_hub_spec(model) or is_hub_spec(weights or ""):
        return None
    _, file = find_files(model, weights)
    return sha256_of_file(Path(file))


def export(
    source: Source,
    output: Path,
    form: str,
    batch: int | None = 1,
    half: bool = False,
    experts: str | None = None,
) -> ExportInfo:
    """Writes a detector for another runtime.

    Args:
        output: file, or for "openvino" a folder; what stands there is overwritten.
        form: one of `FORMATS`; "tensorrt" writes the ONNX file that an engine is built from.
        batch: images that it takes at once; None: any number.
        half: weights are stored in 16 bits.
        experts: one of `experts.EXPERTS`; default: what is fastest there (`DEFAULT_EXPERTS`).

    Raises:
        ValueError: options that don't go together.
    """
    experts = experts or DEFAULT_EXPERTS[form]
    if form == "torch" and half:
        raise ValueError("--half is for onnx, openvino and tensorrt: a .pt2 file keeps its weights")
    if form == "tensorrt" and (experts == "sparse" or batch is None):
        raise ValueError(
            "an engine of TensorRT is built for fixed shapes: use --experts tiles or all, and a "
            "--batch of a number"
        )
    if form == "torch" and experts == "sparse":
        raise ValueError("--experts sparse is for onnx and openvino; torch has tiles and all")
    graph, inputs = _graph(source, experts, batch)
    info = ExportInfo(
        model=source.name,
        names=None if source.slots else source.prompt.phrases,
        size=source.size,
        max_detections=_returned(graph, inputs),
        batch=batch,
        inputs=list(inputs),
        threshold=source.threshold,
        nms=source.nms,
        text=source.slots,
        experts=experts if source.has_experts else None,
        precision="half" if half else "float32",
        weights_sha256=source.weights_sha256,
        versions=_versions(),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write = {"openvino": _write_openvino, "torch": _write_torch}.get(form, _write_onnx)
    write(source, graph, inputs, info, output)
    return info


def _graph(
    source: Source, experts: str, batch: int | None
) -> tuple[DetectorGraph, dict[str, Tensor]]:
    """The graph to trace, and inputs by name."""
    model, size, encoder = source.model, source.size, source.model.text_encoder
    rows = batch or 2  # of 1, tracing would take that it is always 1
    inputs = {
        "image": torch.randint(256, (rows, 3, size, size), dtype=torch.uint8),
        "content": torch.tensor([[size, size * 2 // 3]]).repeat(rows, 1),
    }
    with torch.no_grad():
        chunks = encoder.chunks(source.prompt, model.max_phrases)
        text = encoder([chunk.prompt for chunk in chunks])
    static = static_copy(model, experts)
    if source.slots is None:
        first = torch.tensor([chunk.first for chunk in chunks])
        return DetectorGraph(static, size, model.max_detections, text, first).eval(), inputs
    slots, dim = source.slots, text.tokens.shape[-1]
    tokens, phrases = torch.randn(rows, slots.tokens, dim), torch.eye(slots.phrases, slots.tokens)
    blocks = torch.arange(slots.tokens).repeat(rows, 1)
    texts = {"tokens": tokens, "blocks": blocks, "phrase_map": phrases.repeat(rows, 1, 1)}
    graph = DetectorGraph(static, size, model.max_detections).eval()
    return graph, inputs | texts


def _returned(graph: DetectorGraph, inputs: dict[str, Tensor]) -> int:
    with torch.no_grad():
        return graph(**inputs)[0].shape[1]


def _dynamic(inputs: Mapping[str, Tensor], batch: int | None) -> dict[str, dict] | None:
    if batch is not None:
        return None
    rows = torch.export.Dim("batch", min=1, max=1024)
    return {name: {0: rows} for name in inputs}


def _text_graph(encoder: TextEncoder) -> tuple[nn.Module, dict[str, Tensor], dict[str, dict]]:
    """The text encoder, an input, and what of that may vary."""
    ids = torch.ones(2, 5, dtype=torch.int64)
    rows, length = torch.export.Dim("texts", min=1), torch.export.Dim("length", min=1, max=512)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return TextGraph(encoder).eval(), inputs, {name: {0: rows, 1: length} for name in inputs}


def _write_tokenizer(encoder: TextEncoder, path: Path) -> None:
    encoder.tokenizer.backend_tokenizer.save(str(path))


def _write_onnx(
    source: Source, graph: nn.Module, inputs: dict[str, Tensor], info: ExportInfo, path: Path
) -> None:
    half, batch = info.precision == "half", info.batch
    about = {KEY: info.to_json()}
    write_onnx(graph, inputs, DETECTIONS, path, _dynamic(inputs, batch), about, half)
    if info.text is not None:
        encoder = source.model.text_encoder
        assert isinstance(encoder, TextEncoder)
        text, example, varying = _text_graph(encoder)
        write_onnx(text, example, ["tokens"], text_file(path), varying, half=half)
        _write_tokenizer(encoder, tokenizer_file(path))


def _write_openvino(
    source: Source, graph: nn.Module, inputs: dict[str, Tensor], info: ExportInfo, folder: Path
) -> None:
    """By way of ONNX: a graph has one form, whoever runs it."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "model.onnx"
        _write_onnx(source, graph, inputs, replace(info, precision="float32"), file)
        convert_to_openvino(file, folder, info)


def convert_to_openvino(file: Path, folder: Path, info: ExportInfo) -> None:
    """An exported ONNX file, and what lies beside it, as a folder for OpenVINO."""
    import openvino

    folder.mkdir(exist_ok=True)
    for part, name in ((file, GRAPH), (text_file(file), TEXT)):
        if part.is_file():
            # Not convert_model, which reports to its maker that it was called.
            graph, half = openvino.Core().read_model(part), info.precision == "half"
            openvino.save_model(graph, folder / name, compress_to_fp16=half)
    if info.text is not None:
        (folder / TOKENIZER).write_bytes(tokenizer_file(file).read_bytes())
    (folder / SIDECAR).write_text(info.to_json(), encoding="utf-8")


def _write_torch(
    source: Source, graph: nn.Module, inputs: dict[str, Tensor], info: ExportInfo, path: Path
) -> None:
    def save(module: nn.Module, example: dict, varying: dict | None, file: Path, **extra) -> None:
        with torch.no_grad():
            shapes = varying and {name: varying.get(name) for name in example}
            program = torch.export.export(
                module, (), example, dynamic_shapes=shapes, strict=False
            ).run_decompositions({})
        torch.export.save(program, file, **extra)

    varying = _dynamic(inputs, info.batch)
    save(graph, inputs, varying, path, extra_files={SIDECAR: info.to_json()})
    if info.text is not None:
        encoder = source.model.text_encoder
        assert isinstance(encoder, TextEncoder)
        save(*_text_graph(encoder), text_file(path))
        _write_tokenizer(encoder, tokenizer_file(path))


def _versions() -> dict[str, Any]:
    from dynamic_dino_kernels import __version__

    return {"dynamic_dino": __version__, "torch": torch.__version__}
