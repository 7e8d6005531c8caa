#!/usr/bin/env python
"""Images per second of Grounding DINO here and in transformers: same weights, photos, precision.

    python benchmarks/public_weights.py                        # the tiny model, random weights
    python benchmarks/public_weights.py --save                 # ... kept in benchmarks/results/
    python benchmarks/public_weights.py --weights hf:IDEA-Research/grounding-dino-tiny
    python benchmarks/public_weights.py --models mm-tiny base --images coco/val2017 --size 400 666
    python benchmarks/public_weights.py --device cuda --dtype float16 --accelerate graph

Without --weights, nothing is downloaded: transformers makes a model of the published size with
random weights, and saves it. Both libraries load that directory, or what --weights names.

First the detections are compared, in float32, see `compare`; if they are not the same, nothing is
measured and the exit status is 1. Then both take turns, a photo a turn, so that a slow moment of
the machine hits both. "end to end" is from a PIL image to boxes: resizing, normalising, forward
pass, post-processing, transformers' with its default processor. "forward" starts at the resized
image; ours has the normalisation and the post-processing in it. With "encoded" the text encoder
runs for every photo; "cached" is a further photo with the same names, which transformers doesn't
know. Given are medians, quartiles, and how many times as many images per second as transformers.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from detectron2.structures import Instances
from dynamic_dino.console import command
from dynamic_dino.data.catalog import dataset_root
from dynamic_dino.data.image_files import find_images
from dynamic_dino.data.images import as_array
from dynamic_dino.modeling.postprocess import best_pairs, to_instances
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.modeling.structures import Predictions, PromptChunk
from dynamic_dino.serving.accelerate import MODES
from dynamic_dino.serving.inference import DTYPES, Detector, load_detector
from dynamic_dino.sources import HUB, model_directory, resolve_model
from lib.detectors import NAMES
from lib.interleaved import interleave, quartiles, timed
from lib.options import add_machine, add_output, new_parser, place_output, use_threads
from lib.peer_models import SWIN_BASE, SWIN_TINY, TOKENIZER
from lib.provenance import machine_name, provenance, settings, write_json
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers.models.grounding_dino import (
    GroundingDinoImageProcessor,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
)

SCORES, PIXELS = 1e-3, 0.5  # as far may a detection and its twin be apart
SHARE = 0.99  # of the detections must have a twin
PICTURE = Path(__file__).parent / "results/cpu/shipped_photos.jpg"
MODELS = {  # the published sizes: (MM-Grounding-DINO?, Swin)
    "tiny": (False, SWIN_TINY),
    "base": (False, SWIN_BASE),
    "mm-tiny": (True, SWIN_TINY),
    "mm-base": (True, SWIN_BASE),
}


def save_random(folder: Path, mm: bool, swin: dict) -> None:
    """A model of the published size as it would be downloaded, alive enough for photos to differ:
    in a fresh one, boxes are where queries start, and all scores are 0 or 1."""
    backbone = transformers.SwinConfig(**swin)
    if mm:  # the published models don't share heads between decoder layers
        own = {"decoder_bbox_embed_share": False, "decoder_cls_embed_share": False}
        config = transformers.MMGroundingDinoConfig(backbone_config=backbone, **own)
        model = transformers.MMGroundingDinoForObjectDetection(config)
    else:
        config = transformers.GroundingDinoConfig(backbone_config=backbone)
        model = transformers.GroundingDinoForObjectDetection(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        if not mm:  # MM-Grounding-DINO scales logits, this one trusts in training
            model.model.decoder.layer_norm.weight.mul_(0.1)
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model(TOKENIZER))
    GroundingDinoProcessor(GroundingDinoImageProcessor(), tokenizer).save_pretrained(folder)


# ---- what both do -------------------------------------------------------------------------------


@dataclass
class Twins:
    """The same weights in both libraries, and what they are asked for."""

    ours: Detector
    theirs: nn.Module
    processor: GroundingDinoProcessor
    prompt: Prompt

    def their_inputs(self, photo: Image.Image, images=None) -> dict[str, Tensor]:
        """images: an image processor; default: transformers' own choice."""
        images = images or self.processor.image_processor
        size = dict(zip(("shortest_edge", "longest_edge"), self.ours.size, strict=True))
        inputs = images(images=photo, size=size, return_tensors="pt")
        inputs.update(self.processor.tokenizer([self.prompt.text], return_tensors="pt"))
        inputs = inputs.to(self.ours.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.theirs.dtype)
        return inputs

    def their_detections(self, photo: Image.Image) -> list[dict]:
        inputs = self.their_inputs(photo)
        return self.processor.post_process_grounded_object_detection(
            self.theirs(**inputs),
            inputs["input_ids"],
            threshold=self.ours.threshold,
            text_threshold=self.ours.threshold,
            target_sizes=[photo.size[::-1]],
        )

    def our_detections(self, photo: Image.Image) -> Instances:
        return self.ours(photo, self.prompt)


def load_twins(
    folder: Path, options: argparse.Namespace, dtype: str = "float32", accelerate: str = "eager"
) -> Twins:
    threshold, spec = options.threshold, f"{HUB}{folder}"
    ours = load_detector(spec, None, options.device, threshold, dtype, accelerate)
    ours.size = tuple(options.size)
    theirs = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(
        folder, dtype=DTYPES[dtype]
    )
    theirs.eval().requires_grad_(False).to(options.device)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    return Twins(ours, theirs, processor, Prompt.parse(options.names))


# ---- are they the same? -------------------------------------------------------------------------


@dataclass
class Comparison:
    """How many of our detections have a twin, and how far these are apart at most."""

    detections: int = 0
    twins: int = 0
    largest_score: float = 0.0
    largest_pixels: float = 0.0

    @property
    def same(self) -> bool:
        return self.detections > 0 and self.twins >= SHARE * self.detections

    def __str__(self) -> str:
        return (
            f"{self.twins} of {self.detections} detections are the same, their scores to "
            f"{self.largest_score:.1e}, their corners to {self.largest_pixels:.1e} pixels"
        )


@torch.inference_mode()
def compare(twins: Twins, photos: list[Image.Image]) -> Comparison:
    """Looks for a twin of each of our best detections among transformers', one by one: the same
    name, a score within SCORES, corners within PIXELS.

    Both get the same pixels, those of the processor that resizes with Pillow, as we do (the other
    one rounds differently). The scores of transformers' boxes follow our rule, the mean probability
    of a name's tokens, as it has none for single names. All of its boxes take part, so that what is
    among the best by a hair's breadth in one isn't missed in the other.

    SHARE leaves room for queries whose selection scores are the same to rounding: they may change
    places, and with these the learned content that they start from.
    """
    result = Comparison()
    for photo in photos:
        ours = twins.ours(photo, twins.prompt, 0.0, twins.ours.model.max_detections)
        output = twins.theirs(**twins.their_inputs(photo, GroundingDinoImageProcessorPil()))
        theirs = by_our_rule(twins, photo, output.logits, output.pred_boxes)
        result.detections += len(ours)
        for name in ours.pred_classes.unique():
            mine, others = (x[x.pred_classes == name] for x in (ours, theirs))
            pixels = (mine.pred_boxes.tensor[:, None] - others.pred_boxes.tensor).abs().amax(-1)
            scores = (mine.scores[:, None] - others.scores).abs()
            pairs = linear_sum_assignment((scores / SCORES + pixels / PIXELS).clamp(max=1e6))
            scores, pixels = scores[pairs], pixels[pairs]
            twin = (scores <= SCORES) & (pixels <= PIXELS)
            if twin.any():
                result.twins += int(twin.sum())
                result.largest_score = max(result.largest_score, scores[twin].max().item())
                result.largest_pixels = max(result.largest_pixels, pixels[twin].max().item())
    return result


def by_our_rule(twins: Twins, photo: Image.Image, logits: Tensor, boxes: Tensor) -> Instances:
    """All (box, name) pairs of transformers' output for one photo."""
    text = twins.ours.model.text_encoder([twins.prompt])
    logits = logits[..., : text.phrase_map.shape[-1]].float()
    pairs = boxes.shape[1] * text.phrase_map.shape[1]
    found = best_pairs(Predictions(logits, boxes.float()), text.phrase_map.float(), pairs)
    sample = {"height": photo.height, "width": photo.width, "prompt": twins.prompt}
    found = found.of_image(0, PromptChunk(twins.prompt, 0))
    [result] = to_instances([sample], [[found]], None)
    instances = result["instances"].to("cpu")
    instances.remove("phrases")  # a list, which can't be indexed by a mask
    return instances


# ---- how fast are they? -------------------------------------------------------------------------


def steps(
    twins: Twins, photos: list[Image.Image], device: str
) -> dict[tuple[str, str, str], Callable[[], float]]:
    """Functions that take one photo after the other, and return seconds, by (library, part, text);
    warmed up."""
    forget = twins.ours.model.text_encoder.forget
    inputs = [twins.their_inputs(photo) for photo in photos]
    samples = [twins.ours._sample(photo, twins.prompt) for photo in photos]

    def each(function: Callable, items: list, before: Callable = lambda: None) -> Callable:
        turns = itertools.cycle(items)

        @torch.inference_mode()
        def step() -> float:
            before()
            item = next(turns)
            return timed(lambda: function(item), device)

        return step

    def theirs(given: dict) -> object:
        return twins.theirs(**given)

    def ours(sample: dict) -> object:
        return twins.ours.model([sample])

    result = {
        ("transformers", "end to end", "encoded"): each(twins.their_detections, photos),
        ("ours", "end to end", "encoded"): each(twins.our_detections, photos, forget),
        ("ours", "end to end", "cached"): each(twins.our_detections, photos),
        ("transformers", "forward", "encoded"): each(theirs, inputs),
        ("ours", "forward", "encoded"): each(ours, samples, forget),
        ("ours", "forward", "cached"): each(ours, samples),
    }
    for step in result.values():
        # A size that is new is slower: caches of shapes, captured graphs.
        for _ in photos if device != "cpu" else photos[:1]:
            step()
    return result


def measure(twins: Twins, photos: list[Image.Image], options: argparse.Namespace) -> list[dict]:
    """A row for each library, part and way with text."""
    times = interleave(steps(twins, photos, options.device), options.repeats)
    times = {key: quartiles(seconds) for key, seconds in times.items()}
    rows = []
    for (library, part, text), time in times.items():
        row = {"library": library, "part": part, "text": text, **time}
        row["fps"] = 1e3 / time["median_ms"]
        row["speedup"] = times["transformers", part, "encoded"]["median_ms"] / time["median_ms"]
        rows.append(row)
    return rows


def print_rows(rows: list[dict]) -> None:
    for row in rows:
        spread = f"{row['low_ms']:.1f}-{row['high_ms']:.1f}"
        line = f"  {row['library']:13}{row['part']:11} text {row['text']:8}"
        line += f"{row['median_ms']:9.1f} ms {spread:>17}  {row['fps']:7.3f} FPS"
        print(f"{line}  {row['speedup']:5.2f} x", flush=True)


# ---- the command --------------------------------------------------------------------------------


def photos_of(paths: list[str] | None, count: int) -> tuple[list[Image.Image], str]:
    """Some photos, evenly spread over those found, and what they are.

    Raises FileNotFoundError, naming the folder.
    """
    root, wanted = dataset_root(), paths or ["coco/val2017"]
    found = [str(p if (p := Path(path)).exists() else root / path) for path in wanted]
    what = ", ".join(wanted)
    if not paths and not Path(found[0]).exists():
        found, what = [str(PICTURE)], PICTURE.name
    files = find_images(found)
    files = files[:: max(1, len(files) // count)][:count]
    return [Image.fromarray(as_array(file)) for file in files], what


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", default=["tiny"], choices=list(MODELS), help="with random weights")
    add("--weights", help="instead: hf:OWNER/NAME or hf:DIRECTORY")
    add(
        "--images",
        nargs="+",
        help="photos or folders of them, also under DETECTRON2_DATASETS (default: coco/val2017, or "
        f"{PICTURE.name} where there is none)",
    )
    add("--photos", type=int, default=4, help="how many of those (default: 4)")
    add("--names", default=NAMES, help="what is looked for (default: ten names)")
    add("--threshold", type=float, help="of detections (default: 0.25, random weights: 0.95)")
    add("--size", type=int, nargs=2, default=[800, 1333], help="shortest edge, longest at most")
    add_machine(parser)
    add("--dtype", default="float32", choices=DTYPES, help="of both models' weights")
    add("--accelerate", default="eager", choices=MODES, help="ours, see load_detector")
    add("--repeats", type=int, help="photos for each (default: 50 on CUDA, 4 on a CPU)")
    add_output(parser)
    options = parser.parse_args(arguments)
    options.repeats = options.repeats or (50 if options.device == "cuda" else 4)
    if options.threshold is None:  # random weights score anything between 0 and 1
        options.threshold = 0.25 if options.weights else 0.95
    if options.repeats < 2:
        parser.error("--repeats: quartiles need two at least")
    place_output(options, "public_weights")
    return options


def run(folder: Path, photos: list[Image.Image], options: argparse.Namespace) -> dict | None:
    """The comparison and the rows of one model; None if the detections aren't the same."""
    twins = load_twins(folder, options)
    comparison = compare(twins, photos)
    print(f"  {comparison}", flush=True)
    if not comparison.same:
        return None
    if options.dtype != "float32" or options.accelerate != "eager":
        twins = load_twins(folder, options, options.dtype, options.accelerate)
    rows = measure(twins, photos, options)
    print_rows(rows)
    parameters = sum(p.numel() for p in twins.ours.model.parameters())
    return {"parameters": parameters, "comparison": vars(comparison), "rows": rows}


@command
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    use_threads(options)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    photos, what = photos_of(options.images, options.photos)
    shortest, longest = options.size
    print(
        f"{machine_name(options.device)}, {torch.get_num_threads()} threads: "
        f"{len(photos)} photos of {what}, shortest edge {shortest}, longest at most {longest}, "
        f"{options.dtype}, {len(Prompt.parse(options.names).phrases)} names"
    )
    models = {}
    for name in [options.weights] if options.weights else options.models:
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as temporary:
            if options.weights:
                folder = model_directory(options.weights)
            else:
                folder = Path(temporary)
                save_random(folder, *MODELS[name])
            models[name] = run(folder, photos, options)
        if models[name] is None:
            print(f"{name}: the detections are not the same, so nothing is measured")
            return 1
    if options.json:
        report = provenance(("torch", "transformers", "timm"), options.device)
        report["settings"] = settings(options)
        write_json(options.json, report | {"photos": [p.size for p in photos], "models": models})
        print(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
