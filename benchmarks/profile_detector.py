#!/usr/bin/env python
"""Where one image spends its time: by stage of the detector, and by operator or kernel.

    python benchmarks/profile_detector.py
    python benchmarks/profile_detector.py --save      # ... kept in benchmarks/results/<machine>/
    python benchmarks/profile_detector.py --backend sequential --size 800x1333 --trace trace.json
    python benchmarks/profile_detector.py --precision float16 --trained

The detector is that of `fps.py`, served as `load_detector` does; with --trained as training leaves
it. On CUDA the times are those of the GPU. The trace opens in https://ui.perfetto.dev. (The script
isn't called profile.py, since a module of Python's own has that name.)
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path

import torch
from dynamic_dino.console import command
from dynamic_dino.serving.deploy import optimize_for_inference
from dynamic_dino.serving.inference import DTYPES
from lib.detectors import NAMES, RECIPE, build, dense_of, load_model_config, samples, use_backend
from lib.options import add_machine, add_output, image_size, new_parser, place_output, use_threads
from lib.provenance import machine_name, provenance, settings, write_json
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

# name -> modules whose calls add up to the stage; parts of another stage are indented
STAGES = {
    "backbone": ["backbone"],
    "text encoder": ["text_encoder"],
    "enhancer": ["enhancer"],
    "  fusion with text": ["enhancer.layers.*.fusion"],
    "  text layers": ["enhancer.layers.*.text"],
    "  image layers": ["enhancer.layers.*.image"],
    "  cross-scale fusion": ["enhancer.cross_scale"],
    "query selection": ["query_selection"],
    "decoder": ["decoder"],
    "  self-attention": ["decoder.layers.*.self_attention"],
    "  text attention": ["decoder.layers.*.text_attention"],
    "  image attention": ["decoder.layers.*.image_attention"],
    "  FFN or experts": ["decoder.layers.*.ffn"],
    "  heads": ["decoder.class_head", "decoder.box_head"],
}


@contextmanager
def marked(detector: nn.Module) -> Iterator[None]:
    """Stages show up in the profile by their names."""
    with ExitStack() as stack:
        for name, module in detector.named_modules():
            for stage, patterns in STAGES.items():
                if any(fnmatch(name, p) and name.count(".") == p.count(".") for p in patterns):
                    stack.enter_context(_mark(module, f"stage: {stage}"))
        yield


@contextmanager
def _mark(module: nn.Module, label: str) -> Iterator[None]:
    forward = module.forward

    def call(*args, **kwargs):
        with record_function(label):
            return forward(*args, **kwargs)

    module.forward = call
    try:
        yield
    finally:
        module.forward = forward


def run(options: argparse.Namespace) -> profile:
    model = load_model_config(options.config_file, options.overrides)
    model.canvas = None
    torch.manual_seed(0)
    detector = build(dense_of(model) if options.backend == "dense" else model, options.device)
    if options.backend not in ("dense", "auto"):
        use_backend(detector, options.backend)
    if not options.trained:
        optimize_for_inference(detector, DTYPES[options.precision])
    batch = samples(options.size, 1, options.names, options.device)
    activities = [ProfilerActivity.CPU]
    if options.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.inference_mode(), marked(detector):
        for _ in range(2):
            detector(batch)
        with profile(activities=activities) as result:
            for _ in range(options.repeats):
                with record_function("stage: all"):
                    detector(batch)
                if options.device == "cuda":
                    torch.cuda.synchronize()
    return result


def summarise(result: profile, repeats: int, cuda: bool) -> tuple[dict, dict]:
    """Milliseconds per image of the stages, and of the operators or kernels by themselves."""
    stages: Counter = Counter()
    operators: Counter = Counter()
    calls: Counter = Counter()
    for event in result.key_averages():
        total = event.device_time_total if cuda else event.cpu_time_total
        alone = event.self_device_time_total if cuda else event.self_cpu_time_total
        if event.key.startswith("stage: "):
            stages[event.key.removeprefix("stage: ")] += total / 1e3 / repeats
        elif alone:
            operators[event.key] += alone / 1e3 / repeats
            calls[event.key] += event.count // repeats
    ordered = {name: stages[name] for name in ["all", *STAGES] if name in stages}
    return ordered, {name: (ms, calls[name]) for name, ms in operators.most_common()}


@command
def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--config-file", default=RECIPE, help="recipe with experts (default: %(default)s)")
    add_machine(parser)
    add("--size", type=image_size, default=(640, 640), help="HxW (default: 640x640)")
    add("--precision", default="float32", choices=DTYPES)
    add("--backend", default="auto", choices=("auto", "dense", "sequential", "grouped", "triton"))
    add("--trained", action="store_true", help="with batch norms and branches, in float32")
    add("--names", default=NAMES, help="what is looked for (default: ten names)")
    add("--repeats", type=int, default=3)
    add("--rows", type=int, default=15, help="operators that are printed (default: 15)")
    add("--trace", type=Path, help="write a Chrome trace there")
    add_output(parser)
    add("overrides", nargs="*", metavar="key=value", help="of the recipe: model.decoder...=...")
    options = parser.parse_args(arguments)
    place_output(options, "profile_detector")
    use_threads(options)

    result = run(options)
    stages, operators = summarise(result, options.repeats, options.device == "cuda")
    if options.json:
        report = provenance(("torch", "triton"), options.device)
        report["settings"] = settings(options)
        kept = dict(list(operators.items())[: options.rows])
        write_json(options.json, report | {"stages_ms": stages, "operators_ms": kept})
    height, width = options.size
    print(
        f"{machine_name(options.device)}, {height} x {width}, {options.precision}, "
        f"{options.backend}, text cached"
    )
    for name, ms in stages.items():
        print(f"{name:22}{ms:10.2f} ms {ms / stages['all']:6.1%}")
    print(f"\n{'operator or kernel, by itself':52}{'ms':>10}{'calls':>8}")
    for name, (ms, calls) in list(operators.items())[: options.rows]:
        print(f"{name[:50]:52}{ms:10.2f}{calls:8}")
    if options.json:
        print(options.json)
    if options.trace:
        options.trace.parent.mkdir(parents=True, exist_ok=True)
        result.export_chrome_trace(str(options.trace))
        print(f"{options.trace}: open it in https://ui.perfetto.dev")


if __name__ == "__main__":
    main()
