#!/usr/bin/env python
"""Time of one exported MoE layer, in each of the three forms of its experts, over a dense FFN.

    python benchmarks/export_layer.py                        # nano's and Edge's layer, one thread
    python benchmarks/export_layer.py --layers 900x2048 --experts 4 8 16 --runtimes onnxruntime
    python benchmarks/export_layer.py --threads 1 --save     # benchmarks/results/<machine>/

Says which form is the fastest in which runtime, for how many tokens and experts: the defaults of
`python -m dynamic_dino.export` follow from it. Each layer is xE-Top2 with a random router, so that
all experts are used; the dense FFN beside it has as many units as two experts, and is exported by
the same way into the same runtime. Their outputs are compared with PyTorch's layer ("error",
relative to the largest value). All of a row take turns; given are ratios of medians.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import torch
from dynamic_dino.console import command
from dynamic_dino.export.experts import EXPERTS, StaticMoE
from dynamic_dino.export.onnx_format import write_onnx
from dynamic_dino.modeling.feed_forward import FeedForward
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.routers import SoftmaxRouter
from lib import tables
from lib.interleaved import interleave, quartiles, timed
from lib.options import add_output, new_parser, place_output, use_threads
from lib.provenance import provenance, settings, write_json
from torch import Tensor, nn
from tqdm import tqdm

PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "numpy")
RUNTIMES = ("onnxruntime", "openvino", "torch")
DIM, TOP_K = 256, 2
LAYERS = ("100x512", "900x2048")  # nano's and Edge's queries and hidden units
Layer = Callable[[np.ndarray], np.ndarray]


class Alone(nn.Module):
    """A layer as a graph of one input and one output, x [1, T, D]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def load(graph: nn.Module, x: Tensor, runtime: str, threads: int) -> Layer:
    """The graph, written for a runtime and read back; it runs on [1, T, D]."""
    if runtime == "torch":
        run = torch.export.export(graph, (x,)).module()
        return torch.no_grad()(lambda value: run(torch.from_numpy(value)).numpy())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "layer.onnx"
        write_onnx(graph, {"x": x}, ["y"], file)
        if runtime == "openvino":
            import openvino

            options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
            compiled = openvino.Core().compile_model(file, "CPU", options)
            return lambda value: compiled([value])[0]
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda value: session.run(None, {"x": value})[0]


def measure(runtime: str, layer: str, experts: int, repeats: int, threads: int) -> dict:
    tokens, hidden = map(int, layer.split("x"))
    torch.manual_seed(0)
    x = torch.randn(1, tokens, DIM)
    router = SoftmaxRouter(dim=DIM, num_experts=experts, top_k=TOP_K)
    moe = MoEFeedForward(dim=DIM, hidden=hidden, router=router).eval()
    dense = FeedForward(DIM, hidden).eval()
    graphs = {"dense": dense, **{form: StaticMoE(moe, form).eval() for form in EXPERTS}}
    with torch.no_grad():
        wanted = {name: (dense if name == "dense" else moe)(x)[0].numpy() for name in graphs}
    ready = {name: load(Alone(graph).eval(), x, runtime, threads) for name, graph in graphs.items()}
    value = x.numpy()
    errors = {
        name: float(np.abs(run(value) - wanted[name]).max() / np.abs(wanted[name]).max())
        for name, run in ready.items()
    }
    steps = {name: lambda run=run: timed(lambda: run(value), "cpu") for name, run in ready.items()}
    interleave(steps, 3)
    times = {name: quartiles(seconds) for name, seconds in interleave(steps, repeats).items()}
    return {
        "runtime": runtime,
        "tokens": tokens,
        "hidden": hidden,
        "experts": experts,
        "forms": {
            name: times[name]
            | {"ratio": times[name]["median_ms"] / times["dense"]["median_ms"], "error": error}
            for name, error in errors.items()
        },
    }


@command
def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--layers",
        nargs="+",
        default=[*LAYERS],
        metavar="TOKENSxHIDDEN",
        help="default: %(default)s",
    )
    parser.add_argument("--experts", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--runtimes", nargs="+", default=[*RUNTIMES], choices=RUNTIMES)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    add_output(parser)
    options = parser.parse_args(argv)
    place_output(options, "export_layer")
    use_threads(options)
    report = provenance(PACKAGES) | {"settings": settings(options), "rows": []}
    asked = [*product(options.runtimes, options.layers, options.experts)]
    for runtime, layer, experts in tqdm(asked, disable=None):
        row = measure(runtime, layer, experts, options.repeats, options.threads)
        report["rows"].append(row)
        if options.json:
            write_json(options.json, report)
    print(tables.export_layer(report))
    return 0


if __name__ == "__main__":
    main()
