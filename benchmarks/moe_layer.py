#!/usr/bin/env python
"""Time of one FFN of the decoder: dense, and as a mixture of experts with each back-end.

    python benchmarks/moe_layer.py                                       # this machine's defaults
    python benchmarks/moe_layer.py --tokens 900 3600 --dtype bfloat16 --device cuda

Every contender computes the same: k experts of hidden / k units, the arithmetic of the dense FFN.
Measured are the FFN alone, given the routing ("ffn"), and the layer: router, FFN, residual, layer
norm ("layer"); forward, and forward with backward ("train"). Contenders take turns, so that a slow
moment of the machine hits them all; given are medians, their quartiles, and ratios to dense. On
CUDA each is captured in a graph that walks through several layers' weights, as a decoder does:
weights of one layer alone would stay in the cache. The time of a CPU says nothing by itself, look
at the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from dynamic_dino_kernels import expert_ffn, route
from dynamic_dino_kernels.backend import obstacle_of
from report import machine_name, provenance, write_json
from torch import Tensor, nn

DIM, HIDDEN, EXPERTS, TOP_K = 256, 2048, 16, 2


class Dense(nn.Module):
    """Linear, ReLU, linear."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.linear1 = nn.Linear(options.dim, options.hidden)
        self.linear2 = nn.Linear(options.hidden, options.dim)

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        return self.linear2(F.relu(self.linear1(x)))


class Experts(nn.Module):
    """E experts of hidden / k units, run by one back-end."""

    def __init__(self, options: argparse.Namespace, backend: str) -> None:
        super().__init__()
        experts, hidden = options.experts, options.hidden // options.top_k
        self.w1 = nn.Parameter(torch.randn(experts, hidden, options.dim) * options.dim**-0.5)
        self.b1 = nn.Parameter(torch.randn(experts, hidden))
        self.w2 = nn.Parameter(torch.randn(experts, options.dim, hidden) * hidden**-0.5)
        self.b2 = nn.Parameter(torch.randn(experts, options.dim))
        self.backend = backend

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        weights = (self.w1, self.b1, self.w2, self.b2)
        return expert_ffn(x, *weights, ids, gates, backend=self.backend)


class GroupedMM(Experts):
    """The same on torch.nn.functional.grouped_mm, which has no biases: they are added apart."""

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        flat = ids.flatten().long()
        order = flat.argsort(stable=True)
        owner = flat[order]
        ends = F.one_hot(flat, len(self.w1)).sum(0).cumsum(0).int()
        rows = x[order // ids.shape[1]]
        hidden = F.relu(F.grouped_mm(rows, self.w1.transpose(1, 2), offs=ends) + self.b1[owner])
        rows = F.grouped_mm(hidden, self.w2.transpose(1, 2), offs=ends) + self.b2[owner]
        rows = torch.empty_like(rows).index_copy(0, order, rows)
        return (rows.unflatten(0, ids.shape) * gates.unsqueeze(-1).to(x.dtype)).sum(1)


class Layer(nn.Module):
    """Router (of a mixture), FFN, residual, layer norm."""

    def __init__(self, ffn: nn.Module, options: argparse.Namespace) -> None:
        super().__init__()
        self.ffn = ffn
        self.router = nn.Parameter(torch.randn(options.experts, options.dim) * 0.02)
        self.norm = nn.LayerNorm(options.dim)
        self.top_k = options.top_k

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        if not isinstance(self.ffn, Dense):
            backend = getattr(self.ffn, "backend", "auto")
            ids, gates, _, _ = route(x, self.router, self.top_k, backend=backend)
        return self.norm(x + self.ffn(x, ids, gates))


def contenders(options: argparse.Namespace) -> dict[str, Callable[[], nn.Module]]:
    result = {
        "dense": lambda: Dense(options),
        "sequential": lambda: Experts(options, "sequential"),
        "grouped": lambda: Experts(options, "grouped"),
    }
    if not obstacle_of(torch.device(options.device)):
        result["triton"] = lambda: Experts(options, "triton")
    if options.device == "cuda" and options.dtype == torch.bfloat16:
        result["torch grouped_mm"] = lambda: GroupedMM(options, "auto")
    return result


def draw_routing(tokens: int, options: argparse.Namespace, routing: str) -> tuple[Tensor, Tensor]:
    """k distinct experts for each token: evenly, or with the load of a Zipf law."""
    weights = torch.ones(options.experts)
    if routing == "zipf":
        weights = 1 / torch.arange(1, options.experts + 1)
    ids = torch.multinomial(weights.expand(tokens, -1), options.top_k)
    return ids.int(), torch.ones(tokens, options.top_k)


def run(module: nn.Module, x: Tensor, ids: Tensor, gates: Tensor, train: bool) -> None:
    if not train:
        with torch.no_grad():
            module(x, ids, gates)
        return
    for tensor in (x, *module.parameters()):
        tensor.grad = None
    y = module(x.requires_grad_(), ids, gates)
    y.backward(torch.ones_like(y))


def prepare(layers: list[nn.Module], inputs: tuple, train: bool) -> Callable[[], float]:
    """A function that runs all layers once and returns the seconds per layer."""
    x = inputs[0]
    if not x.is_cuda:

        def on_cpu() -> float:
            start = time.perf_counter()
            for layer in layers:
                run(layer, *inputs, train)
            return (time.perf_counter() - start) / len(layers)

        for _ in range(2):
            on_cpu()
        return on_cpu

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for layer in layers * 2:
            run(layer, *inputs, train)
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in layers:
                run(layer, *inputs, train)
        step = graph.replay
    except RuntimeError:  # the loop and `grouped` synchronise, which can't be captured
        torch.cuda.synchronize()

        def step() -> None:
            for layer in layers:
                run(layer, *inputs, train)

    def on_gpu() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(layers)

    return on_gpu


def measure(options: argparse.Namespace) -> Iterator[dict]:
    """One row per token count, routing, part and pass, with the times of all contenders."""
    device = torch.device(options.device)
    for tokens in options.tokens:
        x = torch.randn(tokens, options.dim, device=device, dtype=options.dtype)
        for routing in options.routing:
            ids, gates = (t.to(device) for t in draw_routing(tokens, options, routing))
            for part in options.parts:
                for train in (False, True):
                    steps = {}
                    for name, build in contenders(options).items():
                        layers = [build() for _ in range(options.layers)]
                        if part == "layer":
                            layers = [Layer(layer, options) for layer in layers]
                        layers = [layer.to(device, options.dtype) for layer in layers]
                        steps[name] = prepare(layers, (x, ids, gates), train)
                    times = {name: [] for name in steps}
                    for _ in range(options.repeats):
                        for name, step in steps.items():
                            times[name].append(step())
                    yield {
                        "tokens": tokens,
                        "routing": routing,
                        "part": part,
                        "pass": "train" if train else "forward",
                        "times": {name: summary(values) for name, values in times.items()},
                    }


def summary(seconds: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(seconds, n=4)
    return {"median_us": median * 1e6, "low_us": low * 1e6, "high_us": high * 1e6}


def print_row(row: dict) -> None:
    dense = row["times"]["dense"]["median_us"]
    print(f"T={row['tokens']} {row['routing']} routing, {row['part']}, {row['pass']}")
    for name, t in row["times"].items():
        spread = f"{t['low_us']:.0f}-{t['high_us']:.0f}"
        ratio = t["median_us"] / dense
        print(f"  {name:18}{t['median_us']:10.1f} us {spread:>16}  {ratio:5.2f} x dense")


def plot(rows: list[dict], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    kinds = [("ffn", "forward"), ("ffn", "train"), ("layer", "forward"), ("layer", "train")]
    kinds = [k for k in kinds if any((r["part"], r["pass"]) == k for r in rows)]
    figure, axes = plt.subplots(1, len(kinds), figsize=(4 * len(kinds), 3.6), squeeze=False)
    routing = rows[0]["routing"]
    for axis, kind in zip(axes[0], kinds, strict=True):
        mine = [r for r in rows if (r["part"], r["pass"]) == kind and r["routing"] == routing]
        for name in mine[0]["times"]:
            ratios = [
                r["times"][name]["median_us"] / r["times"]["dense"]["median_us"] for r in mine
            ]
            axis.plot([r["tokens"] for r in mine], ratios, marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=", ".join(kind))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("time / dense")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[])
    parser.add_argument("--routing", nargs="+", default=["uniform"], choices=("uniform", "zipf"))
    parser.add_argument("--parts", nargs="+", default=["ffn"], choices=("ffn", "layer"))
    parser.add_argument("--dim", type=int, default=DIM)
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="of the dense FFN")
    parser.add_argument("--experts", type=int, default=EXPERTS)
    parser.add_argument("--top-k", type=int, default=TOP_K)
    parser.add_argument("--layers", type=int, default=6, help="sets of weights that take turns")
    parser.add_argument("--repeats", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="of a CPU")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--plot", type=Path, help="draw ratio over tokens there")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if cuda else "float32"))
    options.tokens = options.tokens or ([900, 1800, 3600, 7200, 14400] if cuda else [900])
    options.repeats = options.repeats or (50 if cuda else 11)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    print(
        f"{machine_name(options.device)}, {options.dtype}, D={options.dim}, hidden={options.hidden}"
    )
    rows = []
    for row in measure(options):
        print_row(row)
        rows.append(row)
    settings = {
        key: str(value) if isinstance(value, torch.dtype | Path) else value
        for key, value in vars(options).items()
    }
    report = provenance(device=options.device) | {"settings": settings, "rows": rows}
    if options.json:
        write_json(options.json, report)
    if options.plot:
        plot(rows, options.plot, f"{report['machine']}, {json.dumps(settings['dtype'])}")


if __name__ == "__main__":
    main()
