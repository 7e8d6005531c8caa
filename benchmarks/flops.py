#!/usr/bin/env python
"""Operations and parameters of a detector by module: dense, and with mixtures of experts.

    python benchmarks/flops.py                         # Edge at 640 x 640, ten names
    python benchmarks/flops.py --save                  # ... kept in benchmarks/results/cpu/
    python benchmarks/flops.py --size 800 1333 --experts 16 --depth 2
    python benchmarks/flops.py --config-file configs/moe_tuning/nano_x16_stamps.py \\
        --json nano.json model.decoder.num_layers=2    # overrides come last, as in train_net.py

One multiply-add is one; what else counts, see ``lib/flop_count.py``. The count depends on shapes,
not on weights or on the kernels' back-end; but where tokens take as many experts as they like, it
is of those that this image's tokens take.

The image is one; its sides are padded to multiples of 32. The text encoder is counted as if it had
cached no name. Parameters are "active" where one token uses them, k of E experts, and "trainable"
in the recipe, for its dense model in pre-training. "wide" is dense as well, with as many units as
the recipe's experts have together.

The paper (Dynamic-DINO, Tables 8 and 12) is quoted as it stands. Its "decoder" of 2679.51M must be
one layer with its query positions: the FFNs of six layers alone are 5662M. Asked for COCO's 80
names, one layer costs 2700M here. The 0.24M that its x16 adds fit the sum of two outputs and a
softmax over 16, 900 * (256 + 16) = 0.245M; the router's product, 3.7M a layer, isn't among them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from dynamic_dino.config import ConfigError, load_config
from dynamic_dino.console import command
from lib.detectors import NAMES, RECIPE, ROOT, dense_of, load_model_config
from lib.flop_count import DECODER_ROWS, measure
from lib.options import add_output, new_parser, place_output
from lib.provenance import provenance, write_json
from omegaconf import DictConfig

PAPER = {
    "parameters": {"dense": 178e6, "x4": 184e6, "x8": 197e6, "x16": 222e6},
    "decoder": {"dense": 2679.51e6, "x16": 2679.75e6},
    "FPS, A100": {"dense": 109, "x16": 98},
    "FPS, Orin NX": {"dense": 10.2, "x16": 9.4},
}


def models(options: argparse.Namespace) -> Iterator[tuple[str, DictConfig, list[str] | None]]:
    """Name, config and trainable patterns of each column."""
    model = load_model_config(options.config_file, options.overrides)
    trainable = load_config(ROOT / options.config_file, options.overrides).train.trainable
    ffn, dense = model.decoder.layer.ffn, dense_of(model)
    if dense != model:
        yield "dense", dense, None
        yield "wide", dense_of(model, wide=True), None
    if "router" not in ffn:
        yield "recipe", model, trainable
        return
    for number in options.experts or sorted({4, 8, 16, ffn.router.num_experts}):
        ffn.router.num_experts = number
        yield f"x{number}", model, trainable


def print_report(columns: dict[str, dict], paper: dict) -> None:
    def row(label: str, values: Sequence[float | None], digits: int = 3, unit: str = "") -> None:
        cells = ("-" if v is None else f"{v:,.{digits}f}{unit}" for v in values)
        print(f"{label:<24}" + "".join(f"{cell:>11}" for cell in cells))

    flops = [column["flops"] for column in columns.values()]
    print(" " * 24 + "".join(f"{name:>11}" for name in columns))
    print("GFLOPs, one multiply-add counted as one")
    for stage in flops[0]["stages"]:
        if any(f["stages"][stage] for f in flops):
            row(stage.replace("_", " "), [f["stages"][stage] / 1e9 for f in flops])
    row("whole model", [f["total"] / 1e9 for f in flops])
    print("decoder alone, GFLOPs")
    for part in DECODER_ROWS:
        if any(f["decoder"][part] for f in flops):
            row(f"  {part}", [f["decoder"][part] / 1e9 for f in flops])
    row("  sum", [f["stages"]["decoder"] / 1e9 for f in flops])
    row("  one layer, no heads", [f["decoder_layer"] / 1e9 for f in flops])
    shares = [f["decoder"]["router"] / f["stages"]["decoder"] for f in flops]
    row("  router's share", [100 * share for share in shares], unit="%")
    row("routers in whole model", [100 * f["routers"] / f["total"] for f in flops], unit="%")
    print("parameters, millions")
    for kind in ("total", "active", "trainable"):
        row(f"  {kind}", [c["parameters"][kind] / 1e6 for c in columns.values()], 2)
    if paper:
        print("the paper, Tables 8 and 12, 640 x 640")
        for label, key, unit, digits in (
            ("  parameters, millions", "parameters", 1e6, 0),
            ("  decoder (one layer)", "decoder", 1e9, 5),
            ("  FPS on A100", "FPS, A100", 1, 0),
            ("  FPS on Orin NX", "FPS, Orin NX", 1, 1),
        ):
            values = [paper[key].get(name) for name in columns]
            row(label, [v and v / unit for v in values], digits)
    for name, column in columns.items():
        for module, number in column["modules"].items():
            print(f"{name:>6} {number / 1e9:11.3f}  {module}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--config-file", default=RECIPE, help="recipe (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="pixels; default: the recipe's canvas"
    )
    parser.add_argument("--names", default=NAMES, help="prompt, each name followed by a full stop")
    parser.add_argument(
        "--experts", type=numbers, metavar="E,E", help="in the decoder; default: 4, 8, 16, recipe's"
    )
    parser.add_argument("--depth", type=int, default=0, help="list modules by name down to this")
    add_output(parser)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    options = parser.parse_args(arguments)
    place_output(options, "flops")
    return options


def numbers(text: str) -> list[int]:
    """Of a comma-separated list."""
    return [int(number) for number in text.split(",")]


@command
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    paper = PAPER if options.config_file == RECIPE and not options.overrides else {}
    columns = {}
    try:
        for name, model, trainable in models(options):
            size = options.size or [model.canvas or 640] * 2
            columns[name] = measure(model, trainable, tuple(size), options.names, options.depth)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    height, width = size
    print(f"{options.config_file}, {height} x {width}, {options.names}")
    print_report(columns, paper)
    if options.json:
        report = provenance(("torch", "fvcore", "timm", "transformers"))
        report["settings"] = {
            "config_file": options.config_file,
            "overrides": options.overrides,
            "size": [height, width],
            "names": options.names,
        }
        write_json(options.json, report | {"models": columns, "paper": paper})
        print(options.json)


if __name__ == "__main__":
    main()
