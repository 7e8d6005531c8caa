#!/usr/bin/env python
"""Weights packed for oneDNN against PyTorch's own linear layers, on this CPU.

    python benchmarks/packing.py                         # linear layers, the FFN, whole detectors
    python benchmarks/packing.py --save                  # ... kept in benchmarks/results/cpu/
    python benchmarks/packing.py --measure layer --threads 1 --repeats 100

- "linear": one layer, by itself and with ReLU, packed for the rows that it gets and for others.
- "layer": the end of a layer of the Edge model's decoder, FFN, residual and norm, dense and as
  x16-Top2 with its router. Six layers' weights take turns, as in the decoder, so that they come
  from as far as they do there. Tried as well: what experts would take if one's weights served all
  ("cached", no mixture any more: a bound), experts visited in order and up and down in turns,
  weights kept in fewer bits and widened before each product, and one product per group of siblings,
  which start equal and with the paper's gate stay so.
- "bits": one layer by the operators that multiply with bfloat16 and int8 weights as they are.
- "detector": nano and Edge, dense and x16, with random weights; "packed" means all that can be,
  "measured" what `load_detector` chooses.

Timing is interleaved, so that a slow moment hits them all; given are medians, quartiles, ratios.
One thread is timed by the processor's time, which others on the machine disturb less, two or more
by the clock.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from dynamic_dino.console import command
from dynamic_dino.serving.deploy import optimize_for_inference
from dynamic_dino_kernels import expert_ffn, route
from dynamic_dino_kernels.moe.grouped import expert_rows, sum_slots
from dynamic_dino_kernels.moe.packed import pack_experts
from dynamic_dino_kernels.packing import PackedWeight, packed_linear
from lib.detectors import NAMES, RECIPE, build, dense_of, load_model_config, samples
from lib.interleaved import interleave, quartiles
from lib.options import add_output, new_parser, place_output
from lib.provenance import provenance, settings, write_json
from torch import Tensor

NANO = "configs/moe_tuning/nano_x16_drawn.py"
LINEAR = (  # rows, inputs, outputs
    (900, 256, 2048), (900, 2048, 256), (112, 256, 1024), (112, 1024, 256), (100, 256, 512),
    (100, 256, 256), (900, 256, 256), (8400, 256, 256), (1, 256, 1024), (16, 256, 1024),
)  # fmt: skip

Candidates = dict[str, Callable[[], object]]


def linear(rows: int, inputs: int, outputs: int) -> Candidates:
    x, bias = torch.randn(rows, inputs), torch.randn(outputs)
    weight = torch.randn(outputs, inputs) * inputs**-0.5
    packed, other = PackedWeight(weight, rows), PackedWeight(weight, 64)
    return {
        "plain": lambda: F.linear(x, weight, bias),
        "packed": lambda: packed_linear(x, packed, bias),
        "packed for 64 rows": lambda: packed_linear(x, other, bias),
        "plain, ReLU": lambda: F.linear(x, weight, bias).relu_(),
        "packed, ReLU": lambda: packed_linear(x, packed, bias, "relu"),
    }


class Layer:
    """One layer's weights, dense and as experts, each in every form that is compared."""

    def __init__(self, o: argparse.Namespace, x: Tensor) -> None:
        self.x, self.top_k, self.up = x, o.top_k, True
        hidden, dim, experts = o.hidden // o.top_k, o.dim, o.experts
        self.dense = (
            torch.randn(o.hidden, dim) * dim**-0.5,
            torch.randn(o.hidden),
            torch.randn(dim, o.hidden) * o.hidden**-0.5,
            torch.randn(dim),
        )
        # Rows of siblings are equal, so that every token takes a whole group of k.
        self.router = torch.randn(experts // o.top_k, dim) * dim**-0.5
        self.experts = (
            torch.randn(experts, hidden, dim) * dim**-0.5,
            torch.randn(experts, hidden),
            torch.randn(experts, dim, hidden) * hidden**-0.5,
            torch.randn(experts, dim),
        )
        w1, b1, w2, b2 = self.experts
        few = len(x) * o.top_k // experts
        self.packed_dense = PackedWeight(self.dense[0], len(x)), PackedWeight(self.dense[2], len(x))
        self.packed = pack_experts(*self.experts, rows=few)
        groups = experts // o.top_k
        merged = (
            w1.reshape(groups, o.hidden, dim),
            b1.reshape(groups, o.hidden),
            w2.view(groups, o.top_k, dim, hidden).transpose(1, 2).reshape(groups, dim, o.hidden),
            b2.view(groups, o.top_k, dim).sum(1),
        )
        self.merged, self.packed_merged = merged, pack_experts(*merged, rows=few)
        self.bf16 = [w.bfloat16() for w in self.experts]
        self.buffers = torch.empty(hidden, dim), torch.empty(dim, hidden)  # stay in the cache
        self.x16, self.int8 = x.bfloat16(), []
        for w in (w1, w2):
            scale = w.abs().amax(-1) / 127
            self.int8.append(((w / scale[..., None]).round().to(torch.int8), scale))

    def candidates(self) -> dict[str, Callable[[], Tensor]]:
        w1, b1, w2, b2 = self.dense
        p1, p2 = self.packed_dense
        one = [w[:1].expand_as(w) for w in self.experts]
        siblings = self.router.repeat_interleave(self.top_k, 0)
        x, x16 = self.x, self.x16
        dense = {
            "dense": lambda: F.linear(F.linear(x, w1, b1).relu_(), w2, b2),
            "dense, packed": lambda: packed_linear(packed_linear(x, p1, b1, "relu"), p2, b2),
        }
        experts = {
            "experts": lambda *r: expert_ffn(x, *self.experts, *r, backend="grouped"),
            "experts, packed": lambda *r: self.packed(x, *r),
            "experts, cached": lambda *r: expert_ffn(x, *one, *r, backend="grouped"),
            "in order": lambda *r: self._by_expert(self._plain, *r),
            "up and down": self.up_and_down,
            "bfloat16, widened": lambda *r: self._by_expert(self._widened_bf16, *r),
            "int8, widened": lambda *r: self._by_expert(self._widened_int8, *r),
            "bfloat16": lambda *r: expert_ffn(x16, *self.bf16, *r, backend="grouped"),
            "int8": lambda *r: self._by_expert(self._int8, *r),
        }
        merged = {
            "siblings merged": lambda *r: expert_ffn(x, *self.merged, *r, backend="grouped"),
            "siblings merged, packed": lambda *r: self.packed_merged(x, *r),
        }
        result = {name: lambda f=f: self._norm(f()) for name, f in dense.items()}
        for named, router, top_k in (
            (experts, siblings, self.top_k), (merged, self.router, 1)
        ):  # fmt: skip
            for name, f in named.items():
                result[name] = lambda f=f, w=router, k=top_k: self._norm(f(*self._route(w, k)))
        return result

    def _route(self, router: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """With the paper's gate, 1"""
        ids, gates, *_ = route(self.x, router, top_k)
        return ids, torch.ones_like(gates)

    def _norm(self, y: Tensor) -> Tensor:
        return F.layer_norm(self.x + y, self.x.shape[1:])

    def up_and_down(self, ids: Tensor, gates: Tensor) -> Tensor:
        """The experts used last are the next call's first."""
        self.up = not self.up
        return self._by_expert(self._plain, ids, gates, 1 if self.up else -1)

    def _by_expert(
        self, product: Callable[[Tensor, int], Tensor], ids: Tensor, gates: Tensor, step: int = 1
    ) -> Tensor:
        x_rows, sizes, slots, _ = expert_rows(self.x, ids, len(self.experts[0]))
        of_expert, rows = x_rows.split(sizes), x_rows.new_empty(x_rows.shape)
        out = rows.split(sizes)
        for e in range(len(sizes))[::step]:
            if sizes[e]:
                out[e].copy_(product(of_expert[e], e))
        return sum_slots(rows, slots, len(rows), ids, gates)

    def _plain(self, x: Tensor, e: int) -> Tensor:
        w1, b1, w2, b2 = (w[e] for w in self.experts)
        return F.linear(F.linear(x, w1, b1).relu_(), w2, b2)

    def _widened_bf16(self, x: Tensor, e: int) -> Tensor:
        (w1, _, w2, _), (_, b1, _, b2) = self.bf16, self.experts
        hidden = F.linear(x, self.buffers[0].copy_(w1[e]), b1[e]).relu_()
        return F.linear(hidden, self.buffers[1].copy_(w2[e]), b2[e])

    def _widened_int8(self, x: Tensor, e: int) -> Tensor:
        ((w1, s1), (w2, s2)), (_, b1, _, b2) = self.int8, self.experts
        hidden = F.linear(x, self.buffers[0].copy_(w1[e])).mul_(s1[e]).add_(b1[e]).relu_()
        return F.linear(hidden, self.buffers[1].copy_(w2[e])).mul_(s2[e]).add_(b2[e])

    def _int8(self, x: Tensor, e: int) -> Tensor:
        ((w1, s1), (w2, s2)), (_, b1, _, b2) = self.int8, self.experts
        hidden = torch._weight_int8pack_mm(x, w1[e], s1[e]).add_(b1[e]).relu_()
        return torch._weight_int8pack_mm(hidden, w2[e], s2[e]).add_(b2[e])


def layer(o: argparse.Namespace, bits: bool) -> tuple[Candidates, dict[str, float]]:
    """Functions that run all layers once; and each one's error relative to the plain experts."""
    of_bits = ("bfloat16", "int8")
    wanted = ("dense", "experts", *of_bits)
    x = torch.randn(o.tokens, o.dim)
    steps = []
    for _ in range(1 if bits else o.layers):
        candidates = Layer(o, x).candidates()
        steps.append({n: f for n, f in candidates.items() if n in wanted or not bits})
        for name in of_bits if not bits else ():
            del steps[-1][name]
    first, errors = steps[0], {}
    for name in first:
        if name != "experts, cached":  # another function
            want = first["dense" if name.startswith("dense") else "experts"]()
            errors[name] = ((first[name]().float() - want).norm() / want.norm()).item()

    def all_layers(name: str) -> Callable[[], None]:
        return lambda: [step[name]() for step in steps]

    return {name: all_layers(name) for name in first}, errors


def detector(o: argparse.Namespace, config: str, size: int) -> Candidates:
    """Whole detectors from `load_detector`'s path, text cached; all give the same scores."""
    model = load_model_config(config)
    model.canvas = None
    torch.manual_seed(0)
    dense = build(dense_of(model))
    models = {"dense": dense, "x16": build(model, like=dense)}
    batch = samples((size, size), 1, NAMES)
    candidates, scores = {}, {}
    for pack, label in (("never", ""), ("always", ", packed"), ("auto", ", measured")):
        for name, plain in models.items():
            served = optimize_for_inference(copy.deepcopy(plain), pack=pack)
            served.return_routings = False
            candidates[name + label] = lambda served=served: served(batch)
            scores[name + label] = served(batch)[0]["instances"].scores
    for name, found in scores.items():
        if not torch.allclose(found, scores["dense"], atol=1e-3):
            raise SystemExit(f"{config}: the scores of {name} are others than those of dense")
    return candidates


def cases(o: argparse.Namespace) -> Iterator[tuple[str, str, Candidates, dict[str, float], int]]:
    if "linear" in o.measure:
        for shape in LINEAR:
            name = "{} x {} -> {}".format(*shape)
            yield "linear", name, linear(*shape), {}, o.repeats * (10 if shape[0] < 900 else 2)
    if "layer" in o.measure:
        name = f"T={o.tokens}, x{o.experts}-Top{o.top_k}, {o.dim} -> {o.hidden}"
        yield "layer", name, *layer(o, bits=False), o.repeats
    if "bits" in o.measure:
        yield "bits", f"T={o.tokens}", *layer(o, bits=True), 3
    if "detector" in o.measure:
        yield "detector", "nano, 320 x 320", detector(o, NANO, 320), {}, o.repeats
        yield "detector", "Edge, 640 x 640", detector(o, RECIPE, 640), {}, max(3, o.repeats // 4)


def timed(step: Callable[[], object], threads: int) -> float:
    clock = time.process_time if threads == 1 else time.perf_counter
    start = clock()
    step()
    return clock() - start


def print_row(row: dict) -> None:
    first = next(iter(row["results"].values()))["median_us"]
    load = row["load"]
    print(
        f"{row['part']}, {row['case']}, {row['threads']} threads (load of the machine {load:.1f})"
    )
    for name, r in row["results"].items():
        error = f"  error {r['error']:.1e}" if "error" in r else ""
        spread = f"{r['low_us'] / first:.2f}-{r['high_us'] / first:.2f}"
        median = r["median_us"]
        print(f"  {name:26}{median:12.1f} us {median / first:6.3f} ({spread}){error}", flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    measured, add = ("linear", "layer", "bits", "detector"), parser.add_argument
    add("--measure", nargs="+", default=list(measured), choices=measured)
    add("--threads", nargs="+", type=int, default=[1, 2])
    add("--tokens", type=int, default=900)
    add("--dim", type=int, default=256)
    add("--hidden", type=int, default=2048, help="of the dense FFN")
    add("--experts", type=int, default=16)
    add("--top-k", type=int, default=2)
    add("--layers", type=int, default=6, help="sets of weights that take turns")
    add("--repeats", type=int, default=21)
    add_output(parser)
    options = parser.parse_args(arguments)
    place_output(options, "packing")
    return options


@command
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    report = provenance(("torch", "numpy"))
    report["settings"] = settings(options)
    report["vectors"] = torch.backends.cpu.get_cpu_capability()
    report["bfloat16"] = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    report["rows"] = []
    print(f"{report['machine']}, {report['vectors']}", flush=True)
    for threads in options.threads:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        with torch.inference_mode():
            for part, case, candidates, errors, repeats in cases(options):
                steps = {
                    name: lambda step=step, threads=threads: timed(step, threads)
                    for name, step in candidates.items()
                }
                interleave(steps, 1)
                times = interleave(steps, repeats)
                results = {name: quartiles(values, "us") for name, values in times.items()}
                for name, error in errors.items():
                    results[name]["error"] = error
                row = {"part": part, "case": case, "threads": threads}
                row |= {"load": os.getloadavg()[0], "results": results}
                print_row(row)
                report["rows"].append(row)
                if options.json:
                    write_json(
                        options.json, report
                    )  # after each row: a run that dies loses nothing
    if options.json:
        print(options.json)


if __name__ == "__main__":
    main()
