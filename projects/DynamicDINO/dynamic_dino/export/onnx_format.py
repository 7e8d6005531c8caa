"""Graphs as ONNX files."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

OPSET = 20  # the newest that TensorRT 10 takes; GridSample came with 16, Gelu with 20


def write_onnx(
    graph: nn.Module,
    example: dict[str, torch.Tensor],
    outputs: Sequence[str],
    path: Path,
    dynamic: dict[str, dict[int, torch.export.Dim]] | None = None,
    metadata: dict[str, str] | None = None,
    half: bool = False,
) -> None:
    """Traces `graph` with the inputs `example`, by name, and writes it.

    Args:
        dynamic: {input: {dimension: its name}} of what isn't fixed.
        metadata: kept in the file.
        half: weights of more than a few numbers are stored in 16 bits, and computed with in 32.
    """
    import onnx
    from onnxscript.optimizer import fold_constants, remove_unused_nodes

    quiet = logging.getLogger("onnxscript.optimizer")
    quiet.setLevel(logging.ERROR)  # it reports each constant that it can't fold
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*LeafSpec|.*The axis name")  # of torch, of itself
        program = torch.onnx.export(
            graph,
            kwargs=example,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(example),
            output_names=list(outputs),
            dynamic_shapes=dynamic and {name: dynamic.get(name) for name in example},
            custom_translation_table={
                torch.ops.dynamic_dino.sparse_experts.default: sparse_experts_in_onnx
            },
            verbose=False,
            optimize=False,  # its search for fusions takes longer than all else; runtimes fuse
        )
    assert program is not None
    fold_constants(program.model)
    remove_unused_nodes(program.model)
    model = program.model_proto
    if half:
        store_in_half(model)
    for key, value in (metadata or {}).items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)


def sparse_experts_in_onnx(x, gates, w1, b1, w2, b2, activation: str):
    """`experts.sparse_experts`: of every expert, the rows of its tokens (NonZero), two Gemm, and
    the result added where it belongs (ScatterND)."""
    from onnxscript import opset20 as op

    y = op.Mul(x, op.CastLike(op.Constant(value_float=0.0), x))
    for e in range(len(w1)):
        gate = op.Gather(gates, op.Constant(value_int=e), axis=1)  # [T]
        rows = op.Transpose(op.NonZero(gate), perm=[1, 0])  # [n, 1]
        hidden = op.Gemm(op.GatherND(x, rows), w1[e], b1[e], transB=1)
        found = op.Gemm(_ACTIVATIONS[activation](op, hidden), w2[e], b2[e], transB=1)
        weight = op.Unsqueeze(op.GatherND(gate, rows), op.Constant(value_ints=[1]))
        y = op.ScatterND(y, rows, op.Mul(found, weight), reduction="add")
    return y


_ACTIVATIONS = {
    "relu": lambda op, x: op.Relu(x),
    "gelu": lambda op, x: op.Gelu(x),
    "gelu_tanh": lambda op, x: op.Gelu(x, approximate="tanh"),
    "silu": lambda op, x: op.Mul(x, op.Sigmoid(x)),
}


def store_in_half(model) -> None:
    """Halves the file: float32 constants become float16, and are cast to float32 where they are
    read, which runtimes do once. Small ones stay, among them what scales and shifts."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims, dtype=int) < 1024:
            continue
        name, stored = tensor.name, f"{tensor.name}.half"
        limit = np.finfo(np.float16).max
        value = numpy_helper.to_array(tensor).clip(-limit, limit).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(value, stored))
        casts.append(helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
