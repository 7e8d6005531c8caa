#!/usr/bin/env python
"""What Python costs on the way to a GPU: one FFN block of the decoder, dense and as experts.

    python benchmarks/python_time.py                 # no GPU needed
    python benchmarks/python_time.py --save          # ... kept in benchmarks/results/cpu/

At batch 1 an eager detector waits for its launches, so this is what experts cost there beside the
dense FFN. Triton's path runs on a pretended GPU (pretended_gpu.py): kernels are found, compiled for
the target and handed to a launcher that does nothing, so the driver's own microseconds, which a
dense block pays as well, are missing. The dense block runs on one token on the CPU: its dispatch is
what CUDA has too.

Timing is interleaved; given are medians and quartiles of the time that the thread was running, so
that what else the machine does counts little. Machines differ: look at the times beside each other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from dynamic_dino.console import command
from dynamic_dino.modeling.feed_forward import FeedForward
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.routers import SoftmaxRouter
from dynamic_dino_kernels import ms_deform_attn
from dynamic_dino_kernels.replay import Replayed
from lib.interleaved import interleave, quartiles
from lib.options import add_output, new_parser, place_output
from lib.pretended_gpu import Launches, pretend
from lib.provenance import machine_name, provenance, settings, write_json
from torch import Tensor, nn

DIM, HIDDEN = 256, 2048
LEVELS = [(80, 80), (40, 40), (20, 20)]


def candidates(tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What is measured: a call each, in inference mode."""
    x = torch.randn(1, tokens, DIM).to(dtype)
    norm = nn.LayerNorm(DIM).to(dtype)
    moe = MoEFeedForward(DIM, HIDDEN, SoftmaxRouter(DIM)).to(dtype).eval()
    dense, small = FeedForward(DIM, 8), nn.LayerNorm(DIM)
    token = torch.randn(1, 1, DIM)
    value = torch.randn(1, sum(h * w for h, w in LEVELS), 8, DIM // 8).to(dtype)
    points = torch.rand(1, tokens, 8, len(LEVELS), 4)
    locations = torch.rand(*points.shape, 2)
    for module in (moe, norm, dense, small):
        module.requires_grad_(False)

    def dispatched() -> None:
        with unreplayed():
            moe(x, None, norm)

    one_call = InOneCall(moe)
    return {
        "dense block": lambda: dense(token, None, small),
        "experts, one call": lambda: one_call(x, None, norm),
        "experts, router apart": lambda: moe(x, None, norm),
        "experts, dispatched": dispatched,
        "deformable attention": lambda: ms_deform_attn(value, LEVELS, locations, points),
    }


class InOneCall(nn.Module):
    """What `MoEFeedForward` does on CUDA; here the tensors say that they are on the CPU."""

    def __init__(self, moe: MoEFeedForward) -> None:
        super().__init__()
        self.experts, self.router, self.parts = moe.experts, moe.router, moe.parts

    def forward(self, x: Tensor, scene: Tensor | None, norm: nn.LayerNorm) -> tuple:
        block = self.router.block()
        y, routing = self.experts.with_router(x.flatten(0, 1), norm, **block)
        routing.parts = self.parts
        return y.view_as(x), routing


class unreplayed:  # noqa: N801, a context manager, as cheap as can be: it is measured too
    """Sends every call through torch.library and Triton's own launcher."""

    def __enter__(self) -> None:
        self.find, Replayed.find = Replayed.find, lambda *_: None

    def __exit__(self, *_) -> None:
        Replayed.find = self.find


def measure(call: Callable[[], object], inner: int) -> Callable[[], float]:
    def step() -> float:
        start = time.thread_time()
        for _ in range(inner):
            call()
        return (time.thread_time() - start) / inner

    return step


def launches_of(call: Callable[[], object]) -> list[str]:
    Launches.kept = []
    call()
    names = [name for name, _, _ in Launches.kept]
    Launches.kept = None
    return names


@command
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    pretend(options.target)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report = provenance(("torch", "triton"))
    report["settings"] = settings(options)
    dtype = getattr(torch, options.dtype)
    with torch.inference_mode():
        calls = candidates(options.tokens, dtype)
        launched = {name: launches_of(call) for name, call in calls.items()}  # compiles
        launched = {name: launches_of(call) for name, call in calls.items()}
        steps = {name: measure(call, options.inner) for name, call in calls.items()}
        for step in steps.values():
            step()
        times = interleave(steps, options.repeats)
    report["rows"] = {
        name: quartiles(values, "us") | {"launches": launched[name]}
        for name, values in times.items()
    }
    if options.json:
        write_json(options.json, report)
    print(f"{machine_name()}, T={options.tokens} {options.dtype}, Python for {options.target}")
    for name, row in report["rows"].items():
        spread = f"{row['low_us']:.1f}-{row['high_us']:.1f}"
        print(f"  {name:24}{row['median_us']:8.1f} us {spread:>14}  {' '.join(row['launches'])}")
    if options.json:
        print(options.json)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--tokens", type=int, default=900)
    add("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    add("--target", default="sm_90", help="architecture of the pretended GPU (default: sm_90)")
    add("--repeats", type=int, default=51, help="rounds in which all take turns")
    add("--inner", type=int, default=20, help="calls in a turn")
    add_output(parser)
    options = parser.parse_args(arguments)
    place_output(options, "python_time")
    return options


if __name__ == "__main__":
    main()
