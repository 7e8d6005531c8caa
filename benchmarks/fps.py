#!/usr/bin/env python
"""Images per second of a detector: dense, as wide as all experts, and with experts that run on each
back-end.

    python benchmarks/fps.py                                # this machine's defaults
    python benchmarks/fps.py --save                         # ... kept in results/<machine>/
    python benchmarks/fps.py --dtypes float16 --modes graph --sizes 640x640 --batch 8
    python benchmarks/fps.py --config-file configs/moe_tuning/nano_x16_stamps.py --sizes 320x320

The detectors are built from a recipe with random weights, the experts converted from the dense
model, as MoE-Tuning starts: all must find the same, else the run stops. Each goes through the path
of `load_detector`: batch norms folded, weights cast once, from uint8 pixels on the device to
`Instances`. Timing is interleaved; given are medians, quartiles, and FPS over that of dense.
"experts, loop" is the paper's way to run them, at its fastest (`looped_ffn` in moe_peers.py).

"text cached" looks for the same names again, as a camera does; "text encoded" pays for the text
encoder at every image. "many names" is a long vocabulary (LVIS has 1203 names) in one call, against
encoding and running the backbone for every piece of the prompt, as other code bases do.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from dynamic_dino.console import command
from dynamic_dino.modeling.detector import OpenVocabularyDetector
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.serving.accelerate import MODES, mode_of
from dynamic_dino.serving.deploy import optimize_for_inference
from dynamic_dino.serving.inference import DTYPES
from dynamic_dino.serving.packing import PACK
from lib.detectors import (
    NAMES,
    RECIPE,
    build,
    dense_of,
    load_model_config,
    loops,
    samples,
    use_backend,
    use_loop,
)
from lib.figures import save_figure
from lib.interleaved import interleave, quartiles, timed
from lib.options import add_machine, add_output, image_size, new_parser, place_output, use_threads
from lib.provenance import machine_name, provenance, write_json

PRECISIONS = ("float32", "tf32", "float16", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One setting in which all candidates are compared. size: height and width in pixels."""

    size: tuple[int, int]
    batch: int
    precision: str
    mode: str
    text: str

    def __str__(self) -> str:
        height, width = self.size
        return f"{height} x {width}, batch {self.batch}, {self.precision}, {self.mode}, {self.text}"


def detectors(options: argparse.Namespace) -> dict[str, OpenVocabularyDetector]:
    """dense, as wide as all experts together, and the recipe's experts as the paper's loop and on
    every back-end that runs here, with the same weights."""
    model = load_model_config(options.config_file, options.overrides)
    model.canvas = None  # sizes are given here
    torch.manual_seed(0)
    dense = build(dense_of(model), options.device)
    experts = build(model, options.device, like=dense)
    ways = ["sequential", "grouped"] + ["triton"] * (options.device == "cuda")
    wide = build(dense_of(model, wide=True), options.device, like=dense)
    result = {
        "dense": dense,
        "dense, wide": wide,
        "experts, loop": use_loop(copy.deepcopy(experts)),
    }
    for way in ways:
        result[f"experts, {way}"] = use_backend(copy.deepcopy(experts), way)
    return {name: result[name] for name in options.only or result}


def served(
    detector: OpenVocabularyDetector, precision: str, mode: str, pack: str = "auto"
) -> Callable[[list[dict]], list[dict]]:
    """The detector as `load_detector` would give it, with TF32 on or off while it runs."""
    tf32 = precision == "tf32"
    dtype = torch.float32 if tf32 else DTYPES[precision]
    model = optimize_for_inference(copy.deepcopy(detector), dtype, mode, pack)
    model.return_routings = False

    def call(batch: list[dict]) -> list[dict]:
        set_tf32(tf32)
        with torch.inference_mode():
            return model(batch)

    call.model = model
    return call


def set_tf32(on: bool) -> None:
    """Off is PyTorch's own setting for matmuls, which isn't the same as asking for IEEE."""
    torch.backends.cudnn.allow_tf32 = on
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9; once it is set, allow_tf32 can't be read
        matmul.fp32_precision = "tf32" if on else "none"
    else:
        matmul.allow_tf32 = on


def measure(case: Case, models: dict, options: argparse.Namespace) -> dict:
    """One row of the report: FPS, quartiles and memory of every candidate."""
    batch = samples(case.size, case.batch, options.names, options.device)
    steps, memory, scores, ran = {}, {}, {}, {}
    for name, model in models.items():
        make_room(model, case, batch)
        call = served(model, case.precision, case.mode, options.pack)

        def found(call=call) -> list[dict]:
            if case.text == "text encoded":
                call.model.text_encoder.forget()
            return call(batch)

        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        scores[name] = found()[0]["instances"].scores.float()  # compiles, captures, warms up
        found()
        ran[name] = way_it_ran(call.model)
        if options.device == "cuda":
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        steps[name] = lambda found=found: timed(found, options.device)
    check_equal(scores, case)
    times = interleave(steps, options.repeats)
    results = summarise(times, case.batch, memory)
    for name, way in ran.items():
        results[name]["ran"] = way
    return asdict(case) | {"results": results}


def way_it_ran(model: OpenVocabularyDetector) -> str:
    """One of `MODES`, whatever was asked for: what can't be captured or compiled runs eagerly."""
    backbone, rest = mode_of(model.backbone.forward), mode_of(model.detect_chunks)
    return backbone if backbone == rest else f"backbone {backbone}, rest {rest}"


def make_room(model: OpenVocabularyDetector, case: Case, batch: list[dict]) -> None:
    """Decides how many rows each expert of the loop gets in this case, by a run in its precision,
    before anything is captured or timed."""
    for loop in loops(model):
        loop.room = None
    if loops(model):
        trial = served(model, case.precision, "eager")
        trial(batch)
        for loop, tried in zip(loops(model), loops(trial.model), strict=True):
            loop.room = tried.room


def check_equal(scores: dict[str, torch.Tensor], case: Case) -> None:
    """All candidates hold the same function. Raises SystemExit where their scores differ."""
    tolerance = 1e-3 if case.precision == "float32" else 0.05
    first, *others = scores
    for name in others:
        difference = (scores[name] - scores[first]).abs().max().item()
        if not difference <= tolerance:
            raise SystemExit(f"{case}: scores of {name} and {first} differ by {difference:.2g}")


def summarise(times: dict[str, list[float]], images: int, memory: dict[str, float]) -> dict:
    results = {}
    for name, values in times.items():
        results[name] = quartiles(values)
        results[name]["fps"] = images * 1e3 / results[name]["median_ms"]
        if name in memory:
            results[name]["peak_mib"] = memory[name]
    return results


def measure_many_names(models: dict, options: argparse.Namespace) -> dict:
    """A vocabulary in one call, text cached, and chunk by chunk with nothing kept."""
    name, model = list(models.items())[-1]
    precision = options.precisions[-1]
    # Two, so that what one forgets the other still has
    call, forgetful = (served(model, precision, "eager", options.pack) for _ in range(2))
    vocabulary = Prompt.from_phrases([f"object {i}" for i in range(options.many_names)])
    size = options.sizes[0]
    whole = [samples(size, device=options.device)[0] | {"prompt": vocabulary}]
    chunks = call.model.text_encoder.chunks(vocabulary, call.model.max_phrases)

    def chunk_by_chunk() -> None:
        for chunk in chunks:
            forgetful.model.text_encoder.forget()
            forgetful([whole[0] | {"prompt": chunk.prompt}])

    ways = {"piece by piece": chunk_by_chunk, "in one call": lambda: call(whole)}
    for way in ways.values():
        way()
    steps = {n: lambda way=way: timed(way, options.device) for n, way in ways.items()}
    repeats = options.repeats if options.device == "cuda" else 3  # this takes a while
    return {
        "names": options.many_names,
        "pieces": len(chunks),
        "size": size,
        "precision": precision,
        "detector": name,
        "results": summarise(interleave(steps, repeats), 1, {}),
    }


def print_table(title: str, results: dict) -> None:
    print(title)
    first = next(iter(results.values()))["fps"]
    for name, r in results.items():
        spread = f"{r['low_ms']:.1f}-{r['high_ms']:.1f}"
        line = f"  {name:22}{r['fps']:9.2f} FPS {r['median_ms']:10.1f} ms {spread:>16}"
        line += f"  {r['fps'] / first:5.2f} x {next(iter(results))}"
        line += f"  {r['peak_mib']:7.0f} MiB" if "peak_mib" in r else ""
        print(line + (f"  {r['ran']}" if "ran" in r else ""))


def plot(rows: list[dict], path: Path, title: str) -> None:
    """FPS over that of the first candidate, a group of bars for each case."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names = list(rows[0]["results"])
    figure, axis = plt.subplots(figsize=(max(5.0, 1.1 * len(rows)), 4))
    for i, name in enumerate(names):
        ratios = [r["results"][name]["fps"] / r["results"][names[0]]["fps"] for r in rows]
        places = [j + (i - (len(names) - 1) / 2) * 0.8 / len(names) for j in range(len(rows))]
        bars = axis.bar(places, ratios, 0.8 / len(names), label=name)
        axis.bar_label(bars, [f"{r['results'][name]['fps']:.3g}" for r in rows], fontsize=6)
    axis.axhline(1, color="black", linewidth=0.8)
    labels = [
        "\n".join(
            [f"{r['size'][0]} x {r['size'][1]}", r["precision"], r["mode"], r["text"]]
            + [f"batch {r['batch']}"] * (r["batch"] > 1)
        )
        for r in rows
    ]
    axis.set_xticks(range(len(rows)), labels, fontsize=7)
    axis.set(ylabel=f"FPS / {names[0]} (FPS on the bars)", title=title)
    axis.legend(fontsize=7, loc="lower right")
    save_figure(figure, path)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for size in options.sizes:
        for batch in options.batch:
            for precision in options.precisions:
                for mode in options.modes:
                    for text in options.text:
                        yield Case(size, batch, precision, mode, f"text {text}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--config-file", default=RECIPE, help="recipe with experts (default: %(default)s)")
    add_machine(parser)
    add("--sizes", nargs="+", type=image_size, help="HxW; default: 640x640, on CUDA 800x1333 too")
    add("--batch", nargs="+", type=int, default=[1], help="images at once (default: 1)")
    add("--precisions", "--dtypes", nargs="+", choices=PRECISIONS, help="default: all on CUDA")
    add("--modes", nargs="+", choices=MODES, help="default: eager, on CUDA graph too")
    add("--text", nargs="+", choices=("cached", "encoded"), help="default: cached, CUDA both")
    add("--names", default=NAMES, help="what is looked for (default: ten names)")
    add(
        "--many-names",
        type=int,
        help="of a long vocabulary; 0: none; default: 1203, CPU 130",
    )
    add("--only", nargs="+", help="candidates, e.g. dense 'experts, grouped' (default: all)")
    add("--repeats", type=int, help="default: 50 on CUDA, 7 on a CPU")
    add("--pack", default="auto", choices=PACK, help="weights for oneDNN (default: if faster)")
    add_output(parser, plot=True)
    add("overrides", nargs="*", metavar="key=value", help="of the recipe: model.decoder...=...")
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    options.sizes = options.sizes or ([(640, 640), (800, 1333)] if cuda else [(640, 640)])
    options.precisions = options.precisions or (list(PRECISIONS) if cuda else ["float32"])
    options.modes = options.modes or (["eager", "graph"] if cuda else ["eager"])
    options.text = options.text or (["cached", "encoded"] if cuda else ["cached"])
    if options.many_names is None:
        options.many_names = 1203 if cuda else 130
    options.repeats = options.repeats or (50 if cuda else 7)
    place_output(options, "fps")
    return options


@command
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    use_threads(options)
    models = detectors(options)
    print(f"{machine_name(options.device)}, {options.config_file}")
    if options.device == "cpu":
        print(
            f"A CPU: only {', '.join(options.precisions)}, {', '.join(options.modes)}, "
            f"{options.repeats} repeats, {options.many_names} of LVIS's 1203 names; see --help"
        )
    report = provenance(("torch", "triton", "timm", "transformers"), options.device)
    kept = ("config_file", "device", "names", "repeats", "pack", "overrides")
    report["settings"] = {key: getattr(options, key) for key in kept}
    report["settings"]["threads"] = torch.get_num_threads()
    report["rows"] = []
    for case in cases(options):
        row = measure(case, models, options)
        report["rows"].append(row)
        if options.json:
            write_json(options.json, report)  # after each row: a run that dies loses nothing
        print_table(str(case), row["results"])
    if options.many_names:
        row = report["many_names"] = measure_many_names(models, options)
        if options.json:
            write_json(options.json, report)
        print_table(
            f"{row['names']} names in {row['pieces']} chunks, {row['precision']}, "
            f"{row['detector']}",
            row["results"],
        )
    if options.json:
        print(options.json)
    if options.plot:
        plot(report["rows"], options.plot, machine_name(options.device))


if __name__ == "__main__":
    main()
