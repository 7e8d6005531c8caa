#!/usr/bin/env python
"""Time and memory of a training step: pre-training of the dense model against MoE-Tuning.

    python benchmarks/training_step.py                       # Edge; on a CPU, scaled down
    python benchmarks/training_step.py --save                # ... kept in benchmarks/results/
    python benchmarks/training_step.py --device cuda --batch 8 --dtype bfloat16
    python benchmarks/training_step.py --config-file configs/moe_tuning/nano_x16_stamps.py \\
        --size 320 model.decoder.layer.ffn.router.top_k=1         # another recipe, with an override

A step is the project's own: forward, losses, backward, clipping, optimizer, on a generated batch of
noise with random boxes. Three kinds are compared, from the recipe of a MoE-Tuning:
  pre-training    the dense model, of which all trains but what the model's own config freezes
  dense control   the dense model, with what MoE-Tuning trains free
  MoE-Tuning      the mixture, converted from the dense model, with train.trainable free; once with
                  each back-end of the experts
"speed-up" is over pre-training, for which Dynamic-DINO's authors give 1.87. It depends on the share
of the towers: what the step must backpropagate through them, and how long the prompt is.

Timing is interleaved, so that a slow moment of the machine hits them all; given are medians and
quartiles. On CUDA "peak" is the memory that the candidate needs by itself: weights, the optimizer's
state, and what a step adds at most.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from dynamic_dino.config import ConfigError, load_config
from dynamic_dino.console import command
from dynamic_dino.engine.allocator import keep_freed_memory
from dynamic_dino.engine.optim import build_optimizer
from dynamic_dino.engine.trainable import set_trainable
from dynamic_dino.engine.trainer import Trainer
from dynamic_dino.moe.layer import MoEFeedForward
from lib.detectors import (
    COCO_NAMES,
    RECIPE,
    ROOT,
    dense_of,
    load_model_config,
    training_batch,
    use_backend,
)
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
from lib.provenance import machine_name, provenance, settings, write_json
from omegaconf import DictConfig, OmegaConf
from torch import nn

PRE_TRAINING, DENSE_CONTROL = "pre-training", "dense control"
# What a CPU or a GPU is given unless the command line says otherwise.
DEFAULTS = {
    "cpu": {"size": 320, "batch": 1, "names": 10, "dtype": "float32", "repeats": 3},
    "cuda": {"size": 640, "batch": 8, "names": 80, "dtype": "bfloat16", "repeats": 30},
}


def dense_patterns(moe: nn.Module) -> list[str]:
    """What trains in the dense model to match a mixture: the same, and FFNs for their experts."""
    mixtures = [name for name, m in moe.named_modules() if isinstance(m, MoEFeedForward)]
    patterns = {}
    for name, parameter in moe.named_parameters():
        if parameter.requires_grad:
            ffn = next((m for m in mixtures if name.startswith(f"{m}.")), None)
            patterns[f"{ffn}.*" if ffn else name] = None
    return list(patterns)


class Candidates:
    """The kinds of step by name: trainers, what they need, and functions that run one step.

    Raises:
        ConfigError: the recipe has no mixture of experts, or trains what the model lacks.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cfg = load_config(ROOT / options.config_file, options.overrides)
        self.batch = training_batch(options.size, options.batch, options.names, options.boxes)
        self.steps: dict[str, Callable[[], None]] = {}
        self.parameters: dict[str, dict[str, int]] = {}
        self.peaks: dict[str, int] = {}
        config = load_model_config(options.config_file, options.overrides)
        config.canvas = None  # images are padded to the largest of them, not to a square
        dense_config = dense_of(config)
        if dense_config == config:
            raise ConfigError(f"{options.config_file} has no mixture of experts")

        dense = self.model(dense_config)
        start = dense.state_dict()
        moe = self.model(config, start)
        set_trainable(moe, self.cfg.train.trainable)
        control = self.model(dense_config, start)
        set_trainable(control, dense_patterns(moe))
        self.add(dense, PRE_TRAINING)
        self.add(control, DENSE_CONTROL)
        self.add(moe, *(f"MoE-Tuning, {backend}" for backend in options.backends))

    @staticmethod
    def model(config: DictConfig, weights: dict | None = None) -> nn.Module:
        model = instantiate(config)
        if weights:
            model.load_state_dict(weights)
        return model

    def add(self, model: nn.Module, *names: str) -> None:
        """Warms up the steps of a model, whose experts run on the back-end that a name ends on."""
        cuda = self.options.device == "cuda"
        others = torch.cuda.memory_allocated() if cuda else 0
        trainer = self.trainer(model.to(self.options.device))
        for name in names:

            def step(backend: str = name.rpartition(" ")[2]) -> None:
                use_backend(model, backend)
                trainer.run_step()

            step()  # makes the optimizer's state
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                step()
                self.peaks[name] = torch.cuda.max_memory_allocated() - others
            self.steps[name] = step
            self.parameters[name] = {
                "parameters": sum(p.numel() for p in model.parameters()),
                "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            }

    def trainer(self, model: nn.Module) -> Trainer:
        trainer = Trainer(
            model,
            itertools.repeat(self.batch),
            build_optimizer(self.cfg.optimizer, model),
            amp={"enabled": self.options.dtype != "float32", "dtype": self.options.dtype},
            clip_grad=self.cfg.train.clip_grad,
        )
        trainer.storage = EventStorage()
        return trainer


def measure(options: argparse.Namespace) -> list[dict]:
    """A row for each candidate."""
    candidates = Candidates(options)
    steps = {
        name: lambda step=step: timed(step, options.device, CLOCKS[options.clock])
        for name, step in candidates.steps.items()
    }
    times = {name: quartiles(t) for name, t in interleave(steps, options.repeats).items()}
    rows = []
    for name, found in times.items():
        row = {"candidate": name, **candidates.parameters[name], **found}
        row["speedup"] = times[PRE_TRAINING]["median_ms"] / found["median_ms"]
        if name in candidates.peaks:
            row["peak_mib"] = candidates.peaks[name] / 2**20
        rows.append(row)
    return rows


def print_rows(rows: list[dict]) -> None:
    for row in rows:
        spread = f"{row['low_ms']:.0f}-{row['high_ms']:.0f}"
        total = f"{row['parameters'] / 1e6:.1f} M"
        line = f"{row['candidate']:24}{row['trained'] / 1e6:7.1f} of {total} train"
        line += f" {row['median_ms']:9.1f} ms {spread:>12}  speed-up {row['speedup']:.2f}"
        line += f"  peak {row['peak_mib']:.0f} MiB" if "peak_mib" in row else ""
        print(line)


def scale(options: argparse.Namespace) -> dict[str, str]:
    """What is measured, and where the recipe's own is something else, what that is."""
    cfg = load_config(ROOT / options.config_file, options.overrides)
    amp = cfg.train.amp
    loader = OmegaConf.select(cfg, "dataloader.train") or {}
    pairs = {
        "image side": (options.size, OmegaConf.select(cfg, "inference.size")),
        "batch": (options.batch, loader.get("total_batch_size")),
        "names": (options.names, OmegaConf.select(cfg, "dataloader.train.mapper.max_phrases")),
        "precision": (options.dtype, amp.dtype if amp.enabled else "float32"),
    }
    return {
        key: f"{ours}" + (f" (recipe: {theirs})" if theirs not in (None, ours) else "")
        for key, (ours, theirs) in pairs.items()
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    cpu_, cuda_ = DEFAULTS["cpu"], DEFAULTS["cuda"]

    def default(key: str) -> str:
        return f"default: {cuda_[key]} on CUDA, {cpu_[key]} on a CPU"

    parser.add_argument("--config-file", default=RECIPE, help=f"of a MoE-Tuning; default: {RECIPE}")
    add_machine(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help=f"of autocast; float32: none; {default('dtype')}",
    )
    parser.add_argument("--size", type=int, help=f"side of the images; {default('size')}")
    parser.add_argument("--batch", type=int, help=f"images; {default('batch')}")
    parser.add_argument("--names", type=int, help=f"of COCO's in a prompt; {default('names')}")
    parser.add_argument("--boxes", type=int, default=8, help="in an image")
    parser.add_argument("--backends", nargs="+", choices=("sequential", "grouped", "triton"))
    parser.add_argument("--repeats", type=int, help=default("repeats"))
    add_clock(parser)
    add_output(parser)
    parser.add_argument("overrides", nargs="*", help="key=value, for the recipe")
    options = parser.parse_intermixed_args(arguments)
    for key, value in DEFAULTS[options.device].items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    if options.repeats < 2:
        parser.error("--repeats: quartiles need two at least")
    check_clock(parser, options)
    if not 1 <= options.names <= len(COCO_NAMES):
        parser.error(f"--names: 1 to {len(COCO_NAMES)}")
    triton = ["triton"] if options.device == "cuda" else []
    options.backends = options.backends or ["sequential", "grouped", *triton]
    place_output(options, "training_step")
    return options


@command
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    use_threads(options)
    if options.device == "cpu":
        keep_freed_memory()  # as training does
    torch.manual_seed(0)
    try:
        scaled = scale(options)
        print(f"{machine_name(options.device)}, {options.config_file}")
        print(", ".join(f"{key} {value}" for key, value in scaled.items()), flush=True)
        rows = measure(options)
    except ConfigError as error:
        raise SystemExit(f"training_step.py: error: {error}") from None
    if options.json:
        report = provenance(device=options.device)
        report["settings"] = settings(options)
        write_json(options.json, report | {"scale": scaled, "rows": rows})
    print_rows(rows)
    if options.json:
        print(options.json)


if __name__ == "__main__":
    main()
