#!/usr/bin/env python
"""Time of one image through our Edge detectors, and through those of transformers and ultralytics.

    python benchmarks/peers.py                                   # all, at 640 x 640, batch 1
    python benchmarks/peers.py --save                            # ... kept in benchmarks/results/
    python benchmarks/peers.py --models edge-x16 grounding-dino-tiny --size 800 1333
    python benchmarks/peers.py --device cuda --dtype bfloat16    # everyone under autocast

All get the same image and the same ten names, as tensors: the time is that of the forward pass,
for ours, served as `load_detector` does, with the normalisation of the image and the
post-processing, which the others leave to their processors (YOLO-World and YOLOE the suppression of
overlapping boxes). Weights are random, which doesn't matter for speed: nothing is downloaded.
"grounding-dino-tiny-ours" is Grounding DINO tiny's network in this project's code.

"text encoded" runs the text encoder in each forward; "text cached" is a further photo with the same
prompt. transformers' Grounding DINO and MM-Grounding-DINO know the first only, YOLO-World and YOLOE
are timed by the second only, with random features in the place of CLIP's. Timing is interleaved, so
that a slow moment of the machine hits them all; given are medians, quartiles, and how much longer
each takes than Edge x16 that encodes its text. A peer that doesn't run is named, with the reason;
those of ultralytics (AGPL-3.0) need `pip install --no-deps ultralytics`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import numpy as np
import torch
import transformers
from dynamic_dino.console import command
from dynamic_dino.engine.trainer import autocast
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.serving.deploy import optimize_for_inference
from dynamic_dino.sources import resolve_model
from lib.detectors import NAMES, RECIPE, build, dense_of, load_model_config, samples
from lib.interleaved import CLOCKS, interleave, quartiles, timed
from lib.options import (
    add_clock,
    add_machine,
    add_output,
    check_clock,
    new_parser,
    place_output,
    use_threads,
)
from lib.peer_models import CLIP_FEATURES, SWIN_BASE, SWIN_TINY, TOKENIZER
from lib.provenance import machine_name, provenance, settings, write_json
from PIL import Image
from torch import nn

OURS = ("edge-dense", "edge-x16", "grounding-dino-tiny-ours")
GDINO_TINY = "configs/finetune/gdino_tiny_custom.py"
REFERENCE = ("edge-x16", "encoded")  # what ratios refer to


@dataclass
class Candidate:
    """A model in evaluation, what its forward takes, which ways with text it has ("encoded",
    "cached"), how it forgets the text that it keeps, and its parameters, if they can't be counted
    any more."""

    model: nn.Module
    inputs: dict
    texts: tuple[str, ...] = ("encoded", "cached")
    forget: Callable[[], None] = lambda: None
    parameters: int = 0

    def __post_init__(self) -> None:
        self.parameters = self.parameters or count(self.model)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def ours(
    size: tuple[int, int], device: str, recipe: str = RECIPE, dense: bool = False
) -> Candidate:
    config = load_model_config(recipe)
    config.canvas = None  # padded to the image, not to a square
    config.text_encoder.frozen = False  # as pre-trained: all names in one forward of it
    model = build(dense_of(config) if dense else config, device)
    parameters = count(model)  # packed ones are none
    model = optimize_for_inference(model)
    inputs = {"batch": samples(size, device=device)}
    return Candidate(model, inputs, forget=model.text_encoder.forget, parameters=parameters)


def grounding_dino(size: tuple[int, int], device: str, swin: dict, mm: bool = False) -> Candidate:
    backbone = transformers.SwinConfig(**swin)
    if mm:  # its published models don't share heads between decoder layers
        own = {"decoder_bbox_embed_share": False, "decoder_cls_embed_share": False}
        config = transformers.MMGroundingDinoConfig(backbone_config=backbone, **own)
        model = transformers.MMGroundingDinoForObjectDetection(config)
    else:
        config = transformers.GroundingDinoConfig(backbone_config=backbone)
        model = transformers.GroundingDinoForObjectDetection(config)
    text = tokenizer()(NAMES, return_tensors="pt")
    mask = torch.ones(1, *size, dtype=torch.long)
    inputs = {"pixel_values": pixels(size), "pixel_mask": mask, **text}
    return Candidate(model, inputs, texts=("encoded",))


def omdet_turbo(size: tuple[int, int], device: str) -> Candidate:
    config = transformers.OmDetTurboConfig(image_size=list(size))
    model = transformers.OmDetTurboForObjectDetection(config)
    names = Prompt.parse(NAMES).phrases
    inputs = {"pixel_values": pixels(size), "classes_structure": torch.tensor([len(names)])}
    for key, texts in (("classes", names), ("tasks", [f"Detect {', '.join(names)}."])):
        # Padded as its processor does. The words' numbers are BERT's, the last one is CLIP's, as
        # that is where the model looks for a text's feature.
        text = tokenizer()(texts, padding="max_length", max_length=77, return_tensors="pt")
        ids = text["input_ids"]
        ids[ids == tokenizer().sep_token_id] = config.text_config.vocab_size - 1
        inputs |= {f"{key}_input_ids": ids, f"{key}_attention_mask": text["attention_mask"]}

    def forget() -> None:
        for name in ("language_cache_class", "language_cache_prompt"):
            setattr(model, name, type(getattr(model, name))(config.cache_size))

    return Candidate(model, inputs, forget=forget)


def yolo(size: tuple[int, int], device: str, kind: str, config: str) -> Candidate:
    """YOLO-World or YOLOE, as they are deployed: layers fused, and of YOLOE the text as well."""
    tasks = ultralytics_tasks()
    names = Prompt.parse(NAMES).phrases
    model = getattr(tasks, kind)(config, nc=len(names), verbose=False).eval()
    text = nn.functional.normalize(torch.randn(1, len(names), CLIP_FEATURES), dim=-1)
    if kind == "WorldModel":
        model.txt_feats = text
    else:
        head = model.model[-1]
        text = head.get_tpe(text)
        model.set_classes(names, text)
        head.fuse(text)
    return Candidate(model.fuse(verbose=False), {"x": pixels(size)}, texts=("cached",))


def ultralytics_tasks() -> ModuleType:
    """The module that has its models. Its import would look whether there is a network, leave
    settings in the user's folder, and put functions of its own in the place of others' for the
    whole process, such as an `Image.open` that installs packages: these are put back."""
    os.environ |= dict.fromkeys(("YOLO_VERBOSE", "YOLO_AUTOINSTALL"), "false")
    os.environ["YOLO_OFFLINE"] = "true"
    image_open, save = Image.open, torch.save
    with tempfile.TemporaryDirectory() as folder, np.printoptions():
        os.environ.setdefault("YOLO_CONFIG_DIR", folder)
        try:
            from ultralytics.nn import tasks
        except ImportError as error:
            raise ImportError(f"{error}: pip install --no-deps ultralytics (AGPL-3.0)") from None
        finally:
            Image.open, torch.save = image_open, save
            torch.set_printoptions(profile="default")
    return tasks


# Each takes (height, width) and the device.
MODELS: dict[str, Callable[[tuple[int, int], str], Candidate]] = {
    "edge-dense": lambda size, device: ours(size, device, dense=True),
    "edge-x16": lambda size, device: ours(size, device),
    "grounding-dino-tiny": lambda size, device: grounding_dino(size, device, SWIN_TINY),
    "grounding-dino-tiny-ours": lambda size, device: ours(size, device, GDINO_TINY),
    "grounding-dino-base": lambda size, device: grounding_dino(size, device, SWIN_BASE),
    "mm-grounding-dino-tiny": lambda size, device: grounding_dino(size, device, SWIN_TINY, mm=True),
    "omdet-turbo-tiny": omdet_turbo,
    "yolo-world-s": partial(yolo, kind="WorldModel", config="yolov8s-worldv2.yaml"),
    "yolo-world-l": partial(yolo, kind="WorldModel", config="yolov8l-worldv2.yaml"),
    "yoloe-11l": partial(yolo, kind="YOLOEModel", config="yoloe-11l.yaml"),
}


def tokenizer() -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(resolve_model(TOKENIZER))


def pixels(size: tuple[int, int]) -> torch.Tensor:
    """A normalised image of noise, float32 [1, 3, height, width]."""
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))


def prepare(
    candidate: Candidate, device: str, dtype: torch.dtype, clock: str = "wall"
) -> dict[str, Callable[[], float]]:
    """Warmed up functions that run one forward and return its seconds, by "encoded" or "cached".

    In this order, so that a cache is full when the second has its turn.
    """
    candidate.model.to(device).eval()
    inputs = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in candidate.inputs.items()
    }

    @torch.inference_mode()
    def forward() -> None:
        with autocast(device, None if dtype is torch.float32 else dtype):
            candidate.model(**inputs)

    def cached() -> float:
        return timed(forward, device, CLOCKS[clock])

    def encoded() -> float:
        candidate.forget()
        return cached()

    for _ in range(1 if device == "cpu" else 3):
        encoded()
    return {way: {"encoded": encoded, "cached": cached}[way] for way in candidate.texts}


def measure(options: argparse.Namespace) -> tuple[list[dict], dict[str, str]]:
    """A row for each model and way with text, and why which models don't run."""
    size, dtype = tuple(options.size), getattr(torch, options.dtype)
    steps, parameters, failed = {}, {}, {}
    for name in options.models:
        try:
            candidate = MODELS[name](size, options.device)
            prepared = prepare(candidate, options.device, dtype, options.clock)
        except Exception as error:
            if name in OURS:
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{name} doesn't run: {failed[name]}", flush=True)
            continue
        parameters[name] = candidate.parameters
        steps |= {(name, text): step for text, step in prepared.items()}
    times = {key: quartiles(values) for key, values in interleave(steps, options.repeats).items()}
    rows = []
    for (name, text), time in times.items():
        row = {"model": name, "text": text, "parameters": parameters[name], **time}
        row["fps"] = 1e3 / time["median_ms"]
        if REFERENCE in times:
            row["ratio"] = time["median_ms"] / times[REFERENCE]["median_ms"]
        rows.append(row)
    return rows, failed


def print_rows(rows: list[dict]) -> None:
    for row in rows:
        spread = f"{row['low_ms']:.1f}-{row['high_ms']:.1f}"
        line = f"{row['model']:24}{row['parameters'] / 1e6:7.1f} M  text {row['text']:8}"
        line += f"{row['median_ms']:9.1f} ms {spread:>17}  {row['fps']:7.2f} FPS"
        line += f"  {row['ratio']:6.2f} x edge-x16" if "ratio" in row else ""
        print(line)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    add_machine(parser)
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "float16", "bfloat16"),
        help="of autocast, for all alike; float32: none",
    )
    parser.add_argument("--size", type=int, nargs="+", default=[640], help="side, or height width")
    parser.add_argument("--repeats", type=int, help="default: 50 on CUDA, 3 on a CPU")
    add_clock(parser)
    add_output(parser)
    options = parser.parse_args(arguments)
    options.repeats = options.repeats or (50 if options.device == "cuda" else 3)
    if options.repeats < 2:
        parser.error("--repeats: quartiles need two at least")
    check_clock(parser, options)
    if len(options.size) > 2:
        parser.error("--size: one side, or height and width")
    options.size = [options.size[0], options.size[-1]]
    place_output(options, "peers")
    return options


@command
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    use_threads(options)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()  # it tells of each default of a config
    height, width = options.size
    print(f"{machine_name(options.device)}: {height} x {width}, batch 1, {options.dtype}, 10 names")
    report = provenance(("torch", "transformers", "timm", "ultralytics"), options.device)
    report["settings"] = settings(options)
    rows, failed = measure(options)
    if options.json:
        write_json(options.json, report | {"rows": rows, "failed": failed})
    print_rows(rows)
    if options.json:
        print(options.json)


if __name__ == "__main__":
    main()
