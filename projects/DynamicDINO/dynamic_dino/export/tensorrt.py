"""What TensorRT 10 makes an engine of: its limits, checked on the ONNX file, and its builder.

The limits are those of the operator table of onnx-tensorrt for TensorRT 10.0 (docs/operators.md of
github.com/onnx/onnx-tensorrt, June 2024), which needs no GPU to be looked at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

OPSETS = range(9, 21)
LARGEST_K = 3839  # of TopK
UNSUPPORTED = frozenset(
    """
    AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow Col2Im
    CenterCropPad Compress ConcatFromSequence ConvInteger DFT Det DynamicQuantizeLinear
    HammingWindow HannWindow ImageDecoder MatMulInteger MaxRoiPool MaxUnpool MelWeightMatrix
    Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement QLinearConv
    QLinearMatMul RegexFullMatch STFT SequenceAt SequenceConstruct SequenceEmpty SequenceErase
    SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat
    StringNormalizer StringSplit TfIdfVectorizer Unique
    """.split()
)
FROM_DATA = ("NonZero", "NonMaxSuppression")  # supported, but their shapes depend on data


def obstacles(file: Path) -> list[str]:
    """Why TensorRT 10 wouldn't build a plugin-free engine of static shapes of an ONNX file, one
    text for each kind of obstacle; none: nothing that its table speaks of."""
    import onnx

    model = onnx.load(file)
    found: dict[str, int] = {}

    def meet(what: str) -> None:
        found[what] = found.get(what, 0) + 1

    for opset in model.opset_import:
        if opset.domain == "" and opset.version not in OPSETS:
            meet(f"opset {opset.version}, of {OPSETS[0]} to {OPSETS[-1]}")
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = {v.name: v for v in (*inferred.input, *inferred.value_info, *inferred.output)}
    constants = {t.name: t for t in model.graph.initializer}
    constants |= {
        n.output[0]: n.attribute[0].t for n in model.graph.node if n.op_type == "Constant"
    }
    for value in model.graph.input:
        shape = value.type.tensor_type.shape.dim
        if not all(dim.dim_value for dim in shape):
            meet(f"input {value.name} without a fixed shape")
    for node in model.graph.node:
        for what in _of_node(node, values, constants):
            meet(what)
    return [f"{what} ({times} times)" if times > 1 else what for what, times in found.items()]


def _of_node(node: Any, values: dict[str, Any], constants: dict[str, Any]) -> list[str]:
    from onnx import TensorProto, numpy_helper

    def kind(name: str) -> int:
        if name in constants:
            return constants[name].data_type
        return values[name].type.tensor_type.elem_type if name in values else 0

    name, found = node.op_type, []
    if node.domain:
        found.append(f"operator {node.domain}.{name}, which is no ONNX")
    elif name in UNSUPPORTED:
        found.append(f"operator {name}")
    elif name in FROM_DATA:
        found.append(f"operator {name}, whose shape depends on data")
    if name == "ScatterND" and any(
        a.name == "reduction" and a.s != b"none" for a in node.attribute
    ):
        found.append("ScatterND with a reduction")
    if name == "CumSum" and kind(node.input[0]) in (TensorProto.INT32, TensorProto.INT64):
        found.append("CumSum of whole numbers")
    if name == "TopK":
        k = constants.get(node.input[1])
        if k is None:
            found.append("TopK without a constant K")
        elif int(numpy_helper.to_array(k).max()) > LARGEST_K:
            found.append(f"TopK with a K of more than {LARGEST_K}")
    if name != "Cast" and any(kind(i) == TensorProto.UINT8 for i in node.input):
        found.append(f"{name} of uint8, which is for inputs and outputs alone")
    return found


def build_engine(file: Path, engine: Path, half: bool) -> None:
    """Builds and writes the engine of an ONNX file, for the GPU of this machine.

    Raises ValueError where TensorRT isn't installed, with the command that builds the engine
    elsewhere, or says that it can't be built.
    """
    command = f"trtexec --onnx={file} --saveEngine={engine}" + (" --fp16" if half else "")
    try:
        import tensorrt
    except ImportError:
        raise ValueError(
            f"{file} is written, but TensorRT isn't installed here, and an engine is for the GPU "
            f"that it is built on: pip install tensorrt, or there, with the file: {command}"
        ) from None
    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(0)
    reader = tensorrt.OnnxParser(network, logger)
    if not reader.parse_from_file(str(file)):
        errors = "; ".join(str(reader.get_error(i)) for i in range(reader.num_errors))
        raise ValueError(f"TensorRT can't read {file}: {errors}")
    config = builder.create_builder_config()
    if half:
        config.set_flag(tensorrt.BuilderFlag.FP16)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise ValueError(f"TensorRT can't build an engine of {file}; this says more: {command}")
    engine.write_bytes(bytes(built))
