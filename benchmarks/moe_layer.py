#!/usr/bin/env python
"""Time of one FFN of the decoder: dense, and as experts with each back-end and other libraries.

    python benchmarks/moe_layer.py                       # this machine's defaults
    python benchmarks/moe_layer.py --save                # ... kept in benchmarks/results/<machine>/
    python benchmarks/moe_layer.py --tokens 900 3600 --dtypes bfloat16 --device cuda
    python benchmarks/moe_layer.py --experts 4 8 16 --top-k 1 2 --save --name moe_experts
    python benchmarks/moe_layer.py --routers --save      # those of the three papers, moe_routers

Every candidate computes the same: k experts of hidden / k units, the arithmetic of the dense FFN.
Measured are the FFN alone, given the routing ("ffn"), and the end of a decoder layer: router, FFN,
residual, layer norm, where the dense one has no router ("layer"); forward, and forward with
backward ("train"). First each FFN is compared with float64: "error" is the distance of its result,
relative to the norm; ours must stay within 30 roundings. "loop" is the paper's way, at its fastest
(`looped_ffn` in moe_peers.py).

Timing is interleaved, so that a slow moment of the machine hits them all; given are medians, their
quartiles, and ratios to dense. Several layers' weights take turns as well, as in a decoder: those
of one layer alone would stay in the cache. On CUDA each candidate is captured in a graph, unless it
synchronises (each line ends with which it was, "graph" or "eager"), and "roofline" is the share
that it reaches of what the GPU's arithmetic and memory allow. The time of a CPU says nothing by
itself, look at the ratios.

"MiB" is the most that one layer allocates at a time. The forward pass of "layer" is also split into
phases: the router; dispatch, which finds out whose slots are whose and gathers their rows; the
experts' products (with ours, they gather too on CUDA); combine, the weighted sum with residual and
norm. They come from a profile, which slows everything that is short down: look at their shares.

With `--routers` a layer of each paper takes part in the place of back-ends and libraries: Dynamic-
DINO's, HI-MoE's (scene and instance router, k whole experts), and DynMoE's as it starts (its Table
4). They don't compute the same: "operations" are a layer's multiply-adds over the dense FFN's, what
its tokens really took.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path

import torch
from dynamic_dino.console import command
from dynamic_dino_kernels import route
from dynamic_dino_kernels.timing import captured, seconds
from lib.figures import save_figure
from lib.interleaved import interleave, quartiles, timed
from lib.moe_peers import ROUTERS, BenchedExperts, Dense, Grouped, RoutedLayer, candidates
from lib.options import add_machine, add_output, new_parser, place_output, use_threads
from lib.phases import ROUTING, peak_bytes, time_by_phase
from lib.provenance import machine_name, provenance, settings, write_json
from torch import Tensor, nn
from torch.profiler import record_function

OURS = ("loop", "sequential", "grouped", "triton")
# Dense 16-bit TFLOP/s and memory TB/s, from NVIDIA's data sheets; the first name that fits counts.
PEAKS = {
    "H200": (989, 4.8),
    "H100 PCIe": (756, 2.0),
    "H100": (989, 3.35),
    "A100-SXM4-80GB": (312, 2.04),
    "A100 80GB PCIe": (312, 1.94),
    "A100": (312, 1.56),
}


@dataclass(frozen=True)
class Case:
    """One setting of the comparison: sizes, and what is run."""

    tokens: int
    experts: int
    top_k: int
    routing: str
    dtype: torch.dtype
    part: str
    train: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        what = f"T={self.tokens} {dtype}, x{self.experts}-Top{self.top_k}, {self.routing} routing"
        return f"{what}, {self.part}, {'train' if self.train else 'forward'}"


class Layer(nn.Module):
    """Router (of a mixture), FFN, residual, layer norm."""

    def __init__(self, ffn: nn.Module, dim: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.ffn, self.norm, self.top_k = ffn, nn.LayerNorm(dim), top_k
        if not isinstance(ffn, Dense):
            self.router = nn.Parameter(torch.randn(experts, dim) * 0.02)

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        if isinstance(self.ffn, Dense):
            return self.norm(x + self.ffn(x, ids, gates))
        ours = type(self.ffn).forward is BenchedExperts.forward
        with record_function(ROUTING):
            ids, gates, _, blocks = route(x, self.router, self.top_k, backend=self.ffn.backend)
        if not ours:
            return self.norm(x + self.ffn(x, ids, gates))
        norm = (self.norm.weight, self.norm.bias, self.norm.eps)
        return self.ffn(x, ids, gates, norm=norm, blocks=blocks)


class Benchmark:
    """All candidates on the same tokens, with the same routing."""

    def __init__(self, case: Case, options: argparse.Namespace) -> None:
        self.case, self.options = case, options
        self.x = torch.randn(case.tokens, options.dim, device=options.device, dtype=case.dtype)
        weights = torch.ones(case.experts, device=options.device)
        if case.routing == "zipf":
            weights = weights / torch.arange(1, case.experts + 1, device=options.device)
        self.ids = torch.multinomial(weights.expand(case.tokens, -1), case.top_k).int()
        self.gates = torch.rand(case.tokens, case.top_k, device=options.device)

    def build(self, kind: type[nn.Module], ffn_only: bool = False) -> nn.Module:
        o, case = self.options, self.case
        if issubclass(kind, RoutedLayer):
            layer = kind(o.dim, o.hidden, case.experts, case.top_k).train(case.train)
            return layer.to(o.device, case.dtype)
        hidden = o.hidden if kind is Dense else o.hidden // case.top_k
        ffn = kind(o.dim, hidden) if kind is Dense else kind(o.dim, hidden, case.experts)
        if case.part == "layer" and not ffn_only:
            ffn = Layer(ffn, o.dim, case.experts, case.top_k)
        return ffn.to(o.device, case.dtype)

    def run(self, module: nn.Module) -> None:
        if not self.case.train:
            with torch.no_grad():
                module(self.x, self.ids, self.gates)
            return
        x = self.x.requires_grad_()
        for tensor in (x, *module.parameters()):
            tensor.grad = None
        y = module(x, self.ids, self.gates)
        y.backward(torch.ones_like(y))

    def error(self, kind: type[nn.Module]) -> float:
        """Of the result, against the same FFN in float64. Of gradients it would say little: where
        a hidden unit is nearly 0, rounding decides on which side of ReLU's kink it falls."""
        module = self.build(kind, ffn_only=True)
        exact = self.build(kind if kind is Dense else Grouped, ffn_only=True).double()
        exact.load_state_dict(module.state_dict())
        with torch.no_grad():
            y, want = (
                ffn(x, self.ids, self.gates)
                for ffn, x in ((module, self.x), (exact, self.x.double()))
            )
        return ((y.double() - want).norm() / want.norm()).item()

    def prepare(self, kind: type[nn.Module]) -> tuple[Callable[[], float], str]:
        """A function that runs all layers once and returns the seconds per layer; and how it runs
        them, from a "graph" or "eager"."""
        layers = [self.build(kind) for _ in range(self.options.layers)]

        def step() -> None:
            for layer in layers:
                self.run(layer)

        step()  # compiles, and the loop decides how many rows each expert needs
        if self.options.device == "cpu":
            return (lambda: timed(step, "cpu") / len(layers)), "eager"
        try:
            replay, ran = captured(step), "graph"
        except RuntimeError:  # the loop and `grouped` synchronise, which can't be captured
            torch.cuda.synchronize()
            replay, ran = step, "eager"
        return (lambda: seconds(replay) / len(layers)), ran

    def profile(self, kind: type[nn.Module]) -> dict:
        """{"peak_mib"}, and {"phases_us"} of the forward pass of a layer."""
        cuda, layer = self.options.device == "cuda", self.build(kind)
        found = {"peak_mib": peak_bytes(lambda: self.run(layer), cuda) / 2**20}
        if isinstance(layer, RoutedLayer):
            found["operations"] = layer.operations(self.x)
        if self.case.part == "layer" and not self.case.train:
            times = time_by_phase(lambda: self.run(layer), 5, cuda)
            found["phases_us"] = {phase: time * 1e6 for phase, time in times.items()}
        return found


def measure(case: Case, options: argparse.Namespace) -> dict:
    """One row of the report: the errors and times of all candidates."""
    bench = Benchmark(case, options)
    errors, steps, profiles, failed = {}, {}, {}, {}
    kinds = ROUTERS if options.routers else candidates(options.device, case.dtype, case.tokens)
    for name, kind in kinds.items():
        try:
            if case.part == "ffn" and not case.train:
                errors[name] = bench.error(kind)
            steps[name], ran = bench.prepare(kind)
            profiles[name] = bench.profile(kind) | {"ran": ran}
        except Exception as error:
            if name in ("dense", *OURS, *ROUTERS):
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    limit = 30 * torch.finfo(case.dtype).eps
    if wrong := [name for name in OURS if errors.get(name, 0) > limit]:
        raise SystemExit(f"{case}: {wrong} differ from float64 by {errors}, more than {limit}")
    bound = roofline(case, options)
    results = {}
    for name, values in interleave(steps, options.repeats).items():
        results[name] = quartiles(values, "us") | profiles[name]
        if name in errors:
            results[name]["error"] = errors[name]
        if bound and name != "dense":
            results[name]["roofline"] = bound * 1e6 / results[name]["median_us"]
    return {
        "case": str(case),
        "tokens": case.tokens,
        "experts": case.experts,
        "top_k": case.top_k,
        "routing": case.routing,
        "dtype": str(case.dtype).removeprefix("torch."),
        "part": case.part,
        "pass": "train" if case.train else "forward",
        "times": results,
        "failed": failed,
    }


def roofline(case: Case, options: argparse.Namespace) -> float | None:
    """Seconds that the experts' arithmetic or their bytes need at least, on GPUs that we know.

    Forward, the weights are read once; with backward, there are three times the products, the
    weights are read twice, and their gradients written.
    """
    if options.device == "cpu" or case.dtype.itemsize != 2:
        return None
    name = torch.cuda.get_device_name()
    peak = next((peak for key, peak in PEAKS.items() if key in name), None)
    if peak is None:
        return None
    flops = 4 * case.tokens * options.dim * options.hidden
    weights = 2 * case.experts * options.dim * options.hidden // case.top_k
    values = weights + 2 * case.tokens * options.dim
    factor = 3 if case.train else 1
    return factor * max(flops / (peak[0] * 1e12), values * case.dtype.itemsize / (peak[1] * 1e12))


def print_row(row: dict) -> None:
    dense = row["times"]["dense"]["median_us"]
    print(row["case"])
    for name, t in row["times"].items():
        spread = f"{t['low_us']:.0f}-{t['high_us']:.0f}"
        line = f"  {name:18}{t['median_us']:10.1f} us {spread:>16}"
        line += f"  {t['median_us'] / dense:5.2f} x dense"
        line += f"  {t['roofline']:4.0%} of roofline" if "roofline" in t else ""
        line += f"  error {t['error']:.1e}" if "error" in t else ""
        line += f"  {t['operations']:.2f} x the operations" if "operations" in t else ""
        print(f"{line}  {t['peak_mib']:.1f} MiB  {t['ran']}")
        phases = t.get("phases_us", {})
        if whole := sum(phases.values()):  # 0 where the profiler sees no kernels
            print(" " * 20 + ", ".join(f"{p} {us / whole:.0%}" for p, us in phases.items()))
    for name, why in row["failed"].items():
        print(f"  {name:18} doesn't run: {why}")


def plot(rows: list[dict], path: Path, title: str) -> None:
    """Time over that of dense: a column for part and pass, a row for the dtype."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys((row["part"], row["pass"]) for row in rows))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    names = list(dict.fromkeys(name for row in rows for name in row["times"] if name != "dense"))
    settings = list(dict.fromkeys(_setting(row) for row in rows))
    size = (4 * len(kinds), 3.4 * len(dtypes))
    figure, axes = plt.subplots(len(dtypes), len(kinds), figsize=size, squeeze=False)
    for i, dtype in enumerate(dtypes):
        for j, kind in enumerate(kinds):
            axis = axes[i][j]
            axis.axhline(1, color="black", linewidth=1)
            for setting, style in zip(settings, cycle(("-", "--", ":", "-."))):
                for number, name in enumerate(names):
                    points = [
                        (
                            row["tokens"],
                            row["times"][name]["median_us"] / row["times"]["dense"]["median_us"],
                        )
                        for row in rows
                        if (row["part"], row["pass"]) == kind
                        and (row["dtype"], _setting(row)) == (dtype, setting)
                        and name in row["times"]
                    ]
                    axis.plot(
                        *zip(*points, strict=True) if points else ([], []),
                        linestyle=style, marker="o", color=f"C{number}",
                        label=f"{name}, {setting}",
                    )  # fmt: skip
            axis.set(xscale="log", yscale="log", xlabel="tokens", title=f"{', '.join(kind)}")
            axis.grid(alpha=0.3, which="both")
        axes[i][0].set_ylabel(f"time / dense ({dtype})")
    axes[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title)
    save_figure(figure, path)


def _setting(row: dict) -> str:
    return f"x{row['experts']}-Top{row['top_k']}, {row['routing']}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    both = ["uniform", "zipf"]
    add_machine(parser)
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float32", "float16", "bfloat16"),
        help="default: float16 and bfloat16 on CUDA, float32 on a CPU",
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", help="default: 900 to 14400 on CUDA, 900 on a CPU"
    )
    parser.add_argument(
        "--routing", nargs="+", choices=both, help="default: both on CUDA, uniform on a CPU"
    )
    parser.add_argument("--measure", nargs="+", default=["ffn", "layer"], choices=("ffn", "layer"))
    parser.add_argument("--routers", action="store_true", help="of the papers; whole layers only")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=2048, help="of the dense FFN")
    parser.add_argument("--experts", type=int, nargs="+", default=[16], help="(default: 16)")
    parser.add_argument("--top-k", type=int, nargs="+", default=[2], help="(default: 2)")
    parser.add_argument("--layers", type=int, default=6, help="sets of weights that take turns")
    parser.add_argument("--repeats", type=int, help="default: 50 on CUDA, 21 on a CPU")
    add_output(parser, plot=True)
    parser.add_argument("--name", help="of the files of --save (default: moe_layer, moe_routers)")
    options = parser.parse_args(arguments)
    options.name = options.name or ("moe_routers" if options.routers else "moe_layer")
    options.measure = ["layer"] if options.routers else options.measure
    cuda = options.device == "cuda"
    options.dtypes = options.dtypes or (["float16", "bfloat16"] if cuda else ["float32"])
    options.tokens = options.tokens or ([900, 1800, 3600, 7200, 14400] if cuda else [900])
    options.routing = options.routing or (both if cuda else ["uniform"])
    options.repeats = options.repeats or (50 if cuda else 21)
    place_output(options, options.name)
    for top_k in options.top_k:
        if options.hidden % top_k or top_k > min(options.experts):
            parser.error(
                f"--top-k {top_k} must divide --hidden {options.hidden}, and not exceed --experts"
            )
    return options


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for dtype in options.dtypes:
        settings = (
            options.tokens,
            options.experts,
            options.top_k,
            options.routing,
            options.measure,
        )
        for tokens, experts, top_k, routing, part in product(*settings):
            for train in (False, True):
                kind = getattr(torch, dtype)
                yield Case(tokens, experts, top_k, routing, kind, part, train)


@command
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    use_threads(options)
    torch.manual_seed(0)
    machine = machine_name(options.device)
    print(f"{machine}, D={options.dim}, hidden={options.hidden}")
    report = provenance(device=options.device)
    report["settings"] = settings(options)
    report["rows"] = []
    for case in cases(options):
        row = measure(case, options)
        report["rows"].append(row)
        if options.json:
            write_json(options.json, report)  # after each row: a run that dies loses nothing
        print_row(row)
    if options.json:
        print(options.json)
    if options.plot:
        plot(report["rows"], options.plot, f"{machine}: D={options.dim}, hidden={options.hidden}")


if __name__ == "__main__":
    main()
