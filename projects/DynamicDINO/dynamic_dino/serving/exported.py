"""Detectors that `python -m dynamic_dino.export` wrote, run by onnxruntime, OpenVINO or torch.

`load_detector("model.onnx")` leads here. What a file was made of is in it, or beside it, as
`ExportInfo`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from ..modeling.postprocess import to_instances
from ..modeling.prompt import Prompt
from ..modeling.structures import Detections, PromptChunk, TextFeatures
from ..modeling.text import Cache, TextEncoder

FORMAT = 1
KEY = "dynamic_dino"  # of the metadata in an ONNX file
SIDECAR, GRAPH, TEXT, TOKENIZER = "metadata.json", "model.xml", "text.xml", "tokenizer.json"
REMEDIES = {
    "onnxruntime": "pip install 'dynamic-dino[onnx]'",
    "openvino": "pip install 'dynamic-dino[openvino]'",
}

Run = Callable[[Mapping[str, np.ndarray]], Sequence[np.ndarray]]


@dataclass(frozen=True)
class TextSlots:
    """What the text inputs of an exported detector hold, and how its text encoder reads.

    tokens    L, the most tokens of a prompt; phrases: P, the most phrases
    pooled    one token per phrase, see `TextEncoder`
    special   the tokenizer's special tokens, {"cls_token": "[CLS]", ...}
    positions the most tokens of a phrase, if there is a limit
    """

    tokens: int
    phrases: int
    pooled: bool
    special: dict[str, str]
    positions: int | None = None


@dataclass(frozen=True)
class ExportInfo:
    """What an exported detector is.

    model           what was exported, as it was named
    names           what it looks for, in the order of its phrases; None: text is an input
    size            side of its square canvas, in pixels; pictures' longest edges become that
    max_detections  K, the pairs of a query and a phrase that it returns of an image
    batch           images that it takes at once; None: any number
    inputs          names of its inputs, in their order
    threshold, nms  what suits the model, see `load_detector`
    text            its slots for text, if `names` is None
    experts         how its experts are computed; None: it has none
    precision       of its weights
    weights_sha256  of the file of the weights; None: they came from several or from a hub
    versions        of the packages that wrote it
    """

    model: str
    names: list[str] | None
    size: int
    max_detections: int
    batch: int | None
    inputs: list[str]
    threshold: float
    nms: float | None = None
    text: TextSlots | None = None
    experts: str | None = None
    precision: str = "float32"
    weights_sha256: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, source: str | Path) -> ExportInfo:
        """Raises ValueError, naming the source, for what isn't written by this package."""
        try:
            values = json.loads(text)
            if values["format"] > FORMAT:
                raise ValueError(
                    f"{source} was exported by a newer version of Dynamic-DINO "
                    f"({values.get('versions', {}).get('dynamic_dino', '?')}): install that"
                )
            if values.get("text"):
                values["text"] = TextSlots(**values["text"])
            return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"what {source} says of itself can't be read ({type(error).__name__}: {error}): "
                "export the model anew"
            ) from None


class Exported(nn.Module):
    """In the place of an `OpenVocabularyDetector` in evaluation: the same samples, the same
    results, in as many runs of the exported graph as its batch size asks for.

    Args:
        run: {input: array} -> scores, phrases, boxes, see `DetectorGraph`.
        info: what `run` is.
        source: file or folder, of which errors say the name; a server shows them to its clients,
            whom its folders don't concern.
        text: encoder of prompts, where the graph takes text.
    """

    def __init__(
        self, run: Run, info: ExportInfo, source: Path, text: ExportedText | None = None
    ) -> None:
        super().__init__()
        self.run, self.info, self.source, self.text = run, info, source.absolute().name, text
        self.names, self.max_detections = info.names, info.max_detections
        self.canvas = info.size

    def forward(self, batch: list[dict], max_detections: int | None = None) -> list[dict]:
        """Samples, see `OpenVocabularyDetector.detect` -> {"instances": Instances} of each.

        Raises:
            ValueError: other names than are baked in, a larger picture than the canvas, or more
                detections than the graph returns.
        """
        if max_detections is not None and max_detections > self.max_detections:
            raise ValueError(
                f"{self.source} returns {self.max_detections} detections of an image at most, not "
                f"{max_detections}: export it with --max-detections {max_detections}"
            )
        chunks = [(i, c) for i, sample in enumerate(batch) for c in self._chunks(sample["prompt"])]
        found: list[list[Detections]] = [[] for _ in batch]
        step = self.info.batch or max(len(chunks), 1)
        for start in range(0, len(chunks), step):
            together = chunks[start : start + step]
            samples = [batch[i] for i, _ in together]
            feed = self._images(samples, step)
            if self.text is not None:
                feed |= self.text.inputs([chunk.prompt for _, chunk in together], step)
            outputs = self.run({name: feed[name] for name in self.info.inputs})
            scores, phrases, boxes = (torch.from_numpy(np.array(o)) for o in outputs)
            for row, (i, chunk) in enumerate(together):
                real = scores[row] >= 0
                found[i].append(
                    Detections(
                        scores[row][real],
                        phrases[row][real].long() + chunk.first,
                        boxes[row][real],
                        torch.zeros_like(phrases[row][real]),
                        int(real.sum()),
                    )
                )
        return to_instances(batch, found, self.max_detections)

    def _chunks(self, prompt: Prompt) -> list[PromptChunk]:
        if self.text is not None:
            return self.text.chunks(prompt, self.text.slots.phrases)
        names = self.names or []
        if prompt.phrases != names:
            asked = next((p for p in prompt.phrases if p not in names), None)
            other = f"not {asked!r}" if asked else "all of them, in this order"
            some = ", ".join(map(repr, names[:5])) + (" ..." if len(names) > 5 else "")
            raise ValueError(
                f"{self.source} finds the {len(names)} names that were exported with it ({some}), "
                f"{other}: leave the text out, or export it with --text-input"
            )
        return [PromptChunk(prompt, 0)]

    def _images(self, samples: list[dict], rows: int) -> dict[str, np.ndarray]:
        side = self.info.size
        image = np.zeros((rows, 3, side, side), np.uint8)
        content = np.full((rows, 2), side, np.int64)
        for row, sample in enumerate(samples):
            height, width = sample["image"].shape[-2:]
            if max(height, width) > side:
                raise ValueError(
                    f"an image of {height} x {width} pixels doesn't fit the canvas of {side} of "
                    f"{self.source}: resize it, or export with another --size"
                )
            image[row, :, :height, :width] = sample["image"].numpy()
            content[row] = height, width
        return {"image": image, "content": content}


class ExportedText(TextEncoder):
    """`TextEncoder` on an exported graph, which has its projection in it; prompts become arrays.

    Args:
        run: {"input_ids", "attention_mask"} -> features of tokens, see `TextGraph`.
        tokenizer: the tokenizer.json that was written with it.
    """

    def __init__(self, run: Run, slots: TextSlots, tokenizer: Path) -> None:
        nn.Module.__init__(self)
        self.run, self.slots = run, slots
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), **slots.special)
        self.frozen = self.pretrained = True
        self.pooled, self.max_tokens, self.pad_to = slots.pooled, slots.tokens, 1
        self.positions = slots.positions
        self.body = self.proj = self.norm = self.dropout = nn.Identity()
        self._chunks, self._readings = Cache(64), Cache(100_000)
        self._tokens, self._phrases = Cache(100_000), Cache(100_000, weigh=len)

    def inputs(self, prompts: Sequence[Prompt], rows: int) -> dict[str, np.ndarray]:
        """The text inputs of a detector for so many rows; those beyond the prompts are empty."""
        found = [self._features([prompt]) for prompt in prompts]
        dim = found[0].tokens.shape[-1]
        tokens = np.zeros((rows, self.slots.tokens, dim), np.float32)
        blocks = np.full((rows, self.slots.tokens), -1, np.int64)
        phrase_map = np.zeros((rows, self.slots.phrases, self.slots.tokens), np.float32)
        for row in range(rows):
            text: TextFeatures = found[min(row, len(found) - 1)]
            length, phrases = text.tokens.shape[1], text.phrase_map.shape[1]
            tokens[row, :length] = text.tokens[0]
            blocks[row, :length] = text.blocks[0]
            phrase_map[row, :phrases, :length] = text.phrase_map[0]
        return {"tokens": tokens, "blocks": blocks, "phrase_map": phrase_map}

    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        for text in dict.fromkeys(texts):
            if text not in self._phrases:
                ids = np.array(self._ids([text]), np.int64)
                feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
                self._phrases[text] = torch.from_numpy(np.array(self.run(feed)[0][0]))
        return {text: self._phrases[text] for text in texts}


# Files and runtimes ------------------------------------------------------------------------------


def is_exported(model: str | Path) -> bool:
    """Whether `model` is named as what the export writes: .onnx, .pt2, .xml or a folder of it."""
    path = Path(model)
    return path.suffix in (".onnx", ".pt2", ".xml", ".engine") or (path / SIDECAR).is_file()


def text_file(path: Path) -> Path:
    """The text encoder of an exported file: model.onnx -> model.text.onnx."""
    return path.with_suffix(f".text{path.suffix}")


def tokenizer_file(path: Path) -> Path:
    """The tokenizer of an exported file: model.onnx -> model.tokenizer.json."""
    return path.with_suffix(".tokenizer.json")


def load_exported(model: str | Path, device: torch.device, dtype: str = "float32") -> Exported:
    """An exported detector.

    Args:
        model: .onnx, .pt2, or the folder (or the .xml in it) of OpenVINO.
        device: "cpu", or "cuda" for an ONNX file.
        dtype: that OpenVINO computes in; other runtimes have what the file has, "float32".

    Raises:
        FileNotFoundError, ValueError: naming the file, and what to give or to install instead.
    """
    path = Path(model)
    if not path.exists():
        raise FileNotFoundError(f"exported model {path} doesn't exist")
    if path.suffix == ".engine":
        raise ValueError(
            f"{path} is an engine of TensorRT, which its own runtime loads: give the ONNX file "
            "that it was built from"
        )
    path = path.parent if path.suffix == ".xml" else path
    if dtype != "float32" and not path.is_dir():
        raise ValueError(f"dtype {dtype!r} is for OpenVINO alone; {path} computes in float32")
    if path.is_dir():
        return _load_openvino(path, device, dtype)
    return (_load_onnx if path.suffix == ".onnx" else _load_torch)(path, device)


def _with_text(
    path: Path, info: ExportInfo, run: Run, text: Path, tokenizer: Path, load: Callable[[Path], Run]
) -> Exported:
    if info.text is None:
        return Exported(run, info, path)
    for file in (text, tokenizer):
        if not file.is_file():
            raise FileNotFoundError(f"{path} needs {file}, which was written with it")
    return Exported(run, info, path, ExportedText(load(text), info.text, tokenizer))


def _load_onnx(path: Path, device: torch.device) -> Exported:
    ort = _runtime("onnxruntime", path)

    def load(file: Path):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        providers = ["CPUExecutionProvider"]
        if device.type == "cuda":
            if "CUDAExecutionProvider" not in ort.get_available_providers():
                raise ValueError(
                    "device cuda: this onnxruntime is for CPUs: pip install onnxruntime-gpu"
                )
            providers.insert(0, "CUDAExecutionProvider")
        try:
            return ort.InferenceSession(str(file), options, providers=providers)
        except Exception as error:  # classes of its own, which derive from nothing nearer
            raise ValueError(f"{file} can't be loaded by onnxruntime: {error}") from error

    session = load(path)
    about = session.get_modelmeta().custom_metadata_map
    if KEY not in about:
        raise ValueError(
            f"{path} wasn't written by `python -m dynamic_dino.export`, so it isn't known what it "
            "takes and returns"
        )

    def text_run(file: Path) -> Run:
        return _session_run(load(file))

    info = ExportInfo.from_json(about[KEY], path)
    run = _session_run(session)
    return _with_text(path, info, run, text_file(path), tokenizer_file(path), text_run)


def _session_run(session: Any) -> Run:
    return lambda feed: session.run(None, dict(feed))


def _load_openvino(folder: Path, device: torch.device, dtype: str) -> Exported:
    for name in (SIDECAR, GRAPH):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}, so it isn't an exported model")
    openvino = _runtime("openvino", folder)
    if device.type != "cpu":
        raise ValueError(f"device {device}: {folder} is run by OpenVINO, on the CPU: use cpu")
    hint = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]
    core = openvino.Core()

    def load(file: Path) -> Run:
        options = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
        options["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        compiled = core.compile_model(core.read_model(file), "CPU", options)
        return lambda feed: list(compiled(dict(feed)).values())

    text = (folder / SIDECAR).read_text(encoding="utf-8")
    info = ExportInfo.from_json(text, folder / SIDECAR)
    run = load(folder / GRAPH)
    return _with_text(folder, info, run, folder / TEXT, folder / TOKENIZER, load)


def _load_torch(path: Path, device: torch.device) -> Exported:
    if device.type != "cpu":
        raise ValueError(f"device {device}: {path} was traced for the CPU: use cpu")

    def load(file: Path, extra: dict[str, str] | None = None) -> Run:
        try:
            module = torch.export.load(file, extra_files=extra).module()
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"{file} can't be loaded by torch.export: {error}") from error

        def run(feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            with torch.inference_mode():
                outputs = module(**{name: torch.from_numpy(v) for name, v in feed.items()})
            outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
            return [output.numpy() for output in outputs]

        return run

    extra = {SIDECAR: ""}
    run = load(path, extra)
    if not extra[SIDECAR]:
        raise ValueError(
            f"{path} wasn't written by `python -m dynamic_dino.export`, so it isn't known what it "
            "takes and returns"
        )
    about = extra[SIDECAR]
    info = ExportInfo.from_json(about if isinstance(about, str) else about.decode(), path)
    return _with_text(path, info, run, text_file(path), tokenizer_file(path), load)


def _runtime(module: str, path: Path) -> Any:
    """The package that runs a file; ValueError, saying how to install it, where it is missing."""
    try:
        return __import__(module)
    except ImportError:
        raise ValueError(
            f"{path} is run by {module}, which isn't installed: {REMEDIES[module]}"
        ) from None
