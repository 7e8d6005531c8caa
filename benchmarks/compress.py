#!/usr/bin/env python
"""What is kept of the gain where a tuned mixture gets fewer copies, or is made dense again.

    python benchmarks/ablations.py grid --seeds 0 1 2   # trains what is compressed here
    python benchmarks/compress.py --save
    python benchmarks/compress.py output/my_x16 --control output/my_control --copies 4 1

Each run is a folder of train_net.py; its experts are merged, left out, or averaged
(`python -m dynamic_dino.checkpoint compress`), by the loads of its own evaluation, and each is
scored on the run's test sets. Nothing trains. Differences are to the control with the same seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from detectron2.config import instantiate
from dynamic_dino.checkpoint.files import write_safetensors
from dynamic_dino.checkpoint.weights import load_checkpoint
from dynamic_dino.config import load_config
from dynamic_dino.console import command
from dynamic_dino.engine.evaluate import do_test
from dynamic_dino.moe.compress import METHODS, compress
from dynamic_dino.moe.layer import MoEFeedForward
from lib import tables
from lib.detectors import dense_of
from lib.finished_run import read_scores
from lib.options import add_machine, add_output, new_parser, place_output, use_threads
from lib.provenance import provenance, write_json
from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm

ROWS = "output/ablations/glyphs"


def variants(model: nn.Module, options: argparse.Namespace) -> Iterator[tuple[str, int | None]]:
    """(method, copies); None copies: dense."""
    total = next(
        m.router.num_experts // m.parts for m in model.modules() if isinstance(m, MoEFeedForward)
    )
    for copies in options.copies:
        if copies < total:
            yield from ((method, copies) for method in METHODS)
    yield "dense", None


def smaller(cfg: DictConfig, copies: int | None, parts: int) -> DictConfig:
    """The recipe of the compressed model."""
    model = dense_of(cfg.model) if copies is None else cfg.model.copy()
    if copies is not None:
        model.decoder.layer.ffn.router.num_experts = parts * copies
    cfg = cfg.copy()
    cfg.model = model
    return cfg


def size(model: nn.Module) -> dict[str, float]:
    """Parameters of the decoder's FFNs, in millions."""
    ffns = [layer.ffn for layer in model.decoder.layers]
    return {"ffn_parameters": sum(p.numel() for ffn in ffns for p in ffn.parameters()) / 1e6}


def study(folder: Path, options: argparse.Namespace) -> dict[str, dict]:
    """{"as it is", "merge 4", ..., "dense"} -> scores and parameters of one run."""
    cfg = load_config(str(folder / "config.yaml"))
    model = instantiate(cfg.model).eval()
    load_checkpoint(model, folder / "model_final.pth")
    test = next(iter(cfg.dataloader.test))
    routing = json.loads((folder / "evaluation" / test / "results.json").read_text())["routing"]
    loads = [torch.tensor(layer["load"]) for layer in routing]
    parts = next(m.parts for m in model.modules() if isinstance(m, MoEFeedForward))
    found = {"as it is": {"scores": read_scores(folder)} | size(model)}
    for method, copies in tqdm(list(variants(model, options)), desc=str(folder), unit="model"):
        state = compress(model, loads, copies, method if copies else METHODS[0])
        recipe = smaller(cfg, copies, parts)
        with tempfile.TemporaryDirectory() as scratch:
            recipe.train.output_dir = scratch
            write_safetensors(state, path := Path(scratch) / "smaller.safetensors")
            few = instantiate(recipe.model).eval()
            load_checkpoint(few, path)
            scores = do_test(recipe, few.to(options.device), weights=str(folder))
        name = "dense" if copies is None else f"{method}, {copies}"
        found[name] = {"scores": scores} | size(few)
    return found


@command
def main(arguments: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        default=sorted(Path(ROWS).glob("x16/seed*")),
        help=f"folders of runs that differ in their seed (default: {ROWS}/x16/seed*)",
    )
    parser.add_argument(
        "--control",
        type=Path,
        nargs="*",
        default=sorted(Path(ROWS).glob("control/seed*")),
        help=f"of each run, in the same order (default: {ROWS}/control/seed*)",
    )
    parser.add_argument("--copies", type=int, nargs="+", default=[6, 4, 2, 1], metavar="N")
    add_machine(parser)
    add_output(parser)
    options = parser.parse_args(arguments)
    place_output(options, "compress")
    use_threads(options)
    if not options.runs or len(options.runs) != len(options.control):
        parser.error(
            f"{len(options.runs)} runs and {len(options.control)} controls: name one control a run"
        )
    report = provenance(("torch",), options.device) | {"runs": {}, "control": {}}
    for run, control in zip(options.runs, options.control, strict=True):
        report["control"][str(run)] = read_scores(control)
        report["runs"][str(run)] = study(run, options)
        if options.json:
            write_json(options.json, report)
    print(tables.compress(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
