"""Operations of a detector by module, counted as fvcore does, and its parameters.

One multiply-add is one, an element of a norm is 2 (batch) or 5 (layer), of a bilinear sample 4.
Sums of products that aren't matrix products count one per element: the samples of deformable
attention, the k experts of a token, means. Biases, activations, softmax and other elementwise
operators don't count; NOT_COUNTED names them. An operator that is neither counted nor named there
is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from math import prod

import torch
from detectron2.config import instantiate
from dynamic_dino.config import input_errors
from dynamic_dino.engine.trainable import set_trainable
from dynamic_dino.modeling.attention import BiAttention
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.parameters import count_parameters
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lib.detectors import NAMES, samples, use_backend

# ---- operators ----------------------------------------------------------------------------------


def matrix_product(inputs: list, outputs: list) -> int:
    """By the result: fvcore's own goes by the first factor, which may be broadcast."""
    return prod(get_shape(outputs[0])) * get_shape(inputs[0])[-1]


def attention(inputs: list, outputs: list) -> int:
    """Both products of q [..., N, d], k [..., M, d] and v [..., M, c]."""
    q, k, v = map(get_shape, inputs[:3])
    return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def experts(inputs: list, outputs: list) -> Counter:
    """Slots are taken as filled: which of them are empty isn't in the shapes; see `empty_slots`."""
    (_, hidden, dim), (tokens, top_k) = get_shape(inputs[1]), get_shape(inputs[5])
    slots = tokens * top_k
    return Counter(expert_ffn=2 * slots * hidden * dim, gated_sum=slots * dim)


def experts_and_norm(inputs: list, outputs: list) -> Counter:
    """Triton's operator, whose last pass is the layer norm where there is a residual."""
    residual = get_shape(inputs[8])
    return experts(inputs, outputs) + Counter(layer_norm=5 * prod(residual) if residual else 0)


def router(inputs: list, outputs: list) -> int:
    """tokens [T, D], weight [E, D]"""
    (tokens, dim), (number, _) = map(get_shape, inputs[:2])
    return tokens * number * dim


def cosine_router(inputs: list, outputs: list) -> int:
    """The norms of both factors as well."""
    return router(inputs, outputs) + sum(prod(get_shape(factor)) for factor in inputs[:2])


def deformable_attention(inputs: list, outputs: list) -> int:
    """A channel of a point is a bilinear sample, 4, and a product with its weight, 1."""
    value, weights = get_shape(inputs[0]), get_shape(inputs[3])
    return 5 * prod(weights) * value[-1]


def gathered_samples(inputs: list, outputs: list) -> int:
    """Deformable attention on a CPU: four weighted rows are one sample with its weight, so that the
    count is that of `deformable_attention`."""
    rows, table = get_shape(inputs[1]), get_shape(inputs[0])
    return 5 * prod(rows) * table[-1] // 4


def summed(inputs: list, outputs: list) -> int:
    """One per number; to count how often a mask is true is no arithmetic."""
    return prod(get_shape(inputs[0])) if inputs[0].type().dtype().is_floating_point else 0


HANDLES = {
    "aten::matmul": matrix_product,
    "aten::mm": matrix_product,
    "aten::bmm": matrix_product,
    "aten::scaled_dot_product_attention": attention,
    "aten::embedding_bag": gathered_samples,
    "aten::sum": summed,
    "aten::mean": summed,
    "aten::linalg_vector_norm": summed,
    "dynamic_dino::grouped_ffn": experts,
    "dynamic_dino::expert_ffn": experts_and_norm,
    "dynamic_dino::route": router,
    "dynamic_dino::route_any": cosine_router,
    "dynamic_dino::ms_deform_attn": deformable_attention,
}  # fvcore brings those of convolutions, linear layers, norms, resizing and grid_sample

# Deliberately left out, beside what fvcore ignores: shapes, copies and integers.
NOT_COUNTED = {
    # arithmetic, element by element
    *("abs", "add", "addcmul", "sub", "rsub", "mul", "div", "neg", "pow", "sqrt", "log1p", "ceil"),
    *("sin", "cos", "cumsum", "gelu", "hardtanh", "logit", "nan_to_num", "prod", "reciprocal"),
    *("relu", "round", "sigmoid", "silu", "softmax"),
    # comparisons, choices, orders
    *(
        "all",
        "amax",
        "any",
        "argmax",
        "clamp_min",
        "cummax",
        "lt",
        "max_pool2d",
        "minimum",
        "ne",
        "scatter",
    ),
    *("sort", "topk", "where"),
    # look-ups, constants, layouts
    *(
        "embedding",
        "expand_as",
        "eye",
        "fill",
        "lift_fresh",
        "masked_fill",
        "movedim",
        "new_ones",
        "numel",
    ),
    *("numpy_T", "one_hot", "ones_like", "pad", "pad_sequence", "repeat", "repeat_interleave"),
    *("unflatten", "view_as"),
}


def count(model: nn.Module, *inputs: Tensor) -> FlopCountAnalysis:
    """Multiply-adds of one call `model(*inputs)` without gradients, by module and operator.

    Raises:
        RuntimeError: an operator is not known here, or a module with parameters was passed by, so
            that its operations would be another's; the message names it.
    """
    analysis = FlopCountAnalysis(model, inputs).set_op_handle(**HANDLES)
    for name in NOT_COUNTED:  # in place as well
        analysis.set_op_handle(f"aten::{name}", None).set_op_handle(f"aten::{name}_", None)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with torch.no_grad(), _all_outputs(model):
        analysis.total()
    if unknown := analysis.unsupported_ops():
        raise RuntimeError(
            f"nobody said how to count {', '.join(sorted(unknown))}: give flops.py a handle, or "
            "add it to NOT_COUNTED"
        )
    if missing := [name for name in analysis.uncalled_modules() if _must_run(model, name)]:
        raise RuntimeError(f"modules that were never called: {', '.join(sorted(missing))}")
    return analysis


@contextmanager
def _all_outputs(model: nn.Module) -> Iterator[None]:
    """Makes the model return what any of its modules returns. The tracer forgets what no output
    needs, but it is computed all the same: the logits of the first decoder layers, for one."""
    kept = []

    def keep(module: nn.Module, inputs: tuple, output: object) -> None:
        kept.extend(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))

    hooks = [module.register_forward_hook(keep) for module in model.modules()]
    hooks.append(model.register_forward_hook(lambda *_: tuple(kept)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _must_run(model: nn.Module, name: str) -> bool:
    module, parent = (model.get_submodule(n) for n in (name, name.rpartition(".")[0]))
    if next(module.parameters(recurse=False), None) is None or isinstance(module, nn.Embedding):
        return False
    if isinstance(parent, BiAttention):  # applies its image projections to the text's side
        return False
    # The norm after experts is theirs to compute, see `MoEFeedForward`.
    mixture = isinstance(getattr(parent, "ffn", None), MoEFeedForward)
    return not (mixture and isinstance(module, nn.LayerNorm))


# ---- a detector ---------------------------------------------------------------------------------

STAGES = ("backbone", "neck", "text_encoder", "enhancer", "query_selection", "decoder")
# Of the decoder: row -> module and operator; the first that fits counts.
DECODER_ROWS = {
    "self-attention": ("layers.*.self_attention*", "*"),
    "text attention": ("layers.*.text_attention*", "*"),
    "image attention": ("layers.*.image_attention*", "*"),
    "router": ("layers.*.ffn.router*", "*"),
    "gated sum": ("layers.*.ffn*", "gated_sum"),
    "layer norms": ("*", "layer_norm"),  # experts compute theirs, a dense FFN doesn't
    "FFN or experts": ("layers.*.ffn*", "*"),
    "query positions": ("position*", "*"),
    "heads": ("*_head*", "*"),
    "other": ("*", "*"),
}


class OneImage(nn.Module):
    """A detector as a module from the image, uint8 [3, H, W], to tensors, as tracing wants it."""

    def __init__(self, detector: nn.Module, sample: dict) -> None:
        super().__init__()
        self.detector, self.sample = detector, sample

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        found = self.detector([self.sample | {"image": image}])[0]["instances"]
        return found.scores, found.pred_classes, found.pred_boxes.tensor


def empty_slots(
    detector: nn.Module, sample: dict, taken: Sequence[float] | None = None
) -> dict[str, Counter]:
    """What `experts` counts for slots that a router leaves empty: by module of a `OneImage`.

    taken: how many experts a token takes on average, by layer; None: those of this sample.
    """
    with torch.no_grad():
        routings = detector([sample])[0].get("routings", [])
    mixtures = [(n, m) for n, m in detector.named_modules() if isinstance(m, MoEFeedForward)]
    found = {}
    for i, ((name, layer), routing) in enumerate(zip(mixtures, routings, strict=True)):
        slots = int((routing.expert_ids < 0).sum())
        if taken is not None:
            slots = round(len(routing.expert_ids) * (layer.router.top_k - taken[i]))
        _, hidden, dim = layer.experts.w1.shape
        if slots:
            found[f"detector.{name}.experts"] = Counter(
                expert_ffn=2 * slots * hidden * dim, gated_sum=slots * dim
            )
    return found


def own_counts(analysis: FlopCountAnalysis, empty: dict[str, Counter]) -> dict[str, Counter]:
    """What each module does itself, without its children and `empty_slots`: added up, the total."""
    counts = analysis.by_module_and_operator()
    own = {module: Counter(operators) for module, operators in counts.items()}
    for module, operators in counts.items():
        if module:
            own[module.rpartition(".")[0]].subtract(operators)
    for module, operators in empty.items():
        own[module].subtract(operators)
    return own


def by_part(analysis: FlopCountAnalysis, empty: dict[str, Counter]) -> dict:
    """{"total", "stages", "decoder", "routers"}: of all, of each stage, of each part of the
    decoder, and of all routers wherever they are; of a `OneImage`."""
    stages, decoder, routers = Counter(), Counter(), 0
    for module, operators in own_counts(analysis, empty).items():
        stage, _, inner = module.removeprefix("detector").removeprefix(".").partition(".")
        stages[stage if stage in STAGES else "post-processing"] += sum(operators.values())
        routers += sum(operators.values()) if fnmatch(module, "*.router*") else 0
        if stage == "decoder":
            for operator, number in operators.items():
                decoder[_part(inner, operator)] += number
    return {
        "total": int(sum(stages.values())),
        "stages": {name: int(stages[name]) for name in (*STAGES, "post-processing")},
        "decoder": {name: int(decoder[name]) for name in DECODER_ROWS},
        "routers": int(routers),
    }


def _part(module: str, operator: str) -> str:
    return next(
        part for part, (m, o) in DECODER_ROWS.items() if fnmatch(module, m) and fnmatch(operator, o)
    )


def measure(
    model: DictConfig,
    trainable: Sequence[str] | None,
    size: tuple[int, int],
    names: str = NAMES,
    depth: int = 0,
    taken: Sequence[float] | None = None,
) -> dict:
    """FLOPs and parameters of a detector for one image.

    Args:
        trainable: the recipe's patterns, None for what the model doesn't freeze itself.
        size: height and width in pixels.
        depth: how far down "modules", the list of modules by name, goes.
        taken: experts that a token takes on average in each MoE layer, as `RoutingStatistics` has
            it; None: as many as the noise takes here, and in "parameters" the most it can.

    Raises:
        RuntimeError: see `count`.
    """
    with input_errors():
        detector = instantiate(model).eval()
        set_trainable(detector, trainable)
    parameters = count_parameters(detector)
    if taken:
        mixtures = [m for m in detector.modules() if isinstance(m, MoEFeedForward)]
        parameters["active"] += sum(
            round(
                sum(p.numel() for p in m.experts.parameters())
                * (t - m.router.top_k)
                / m.router.num_experts
            )
            for m, t in zip(mixtures, taken, strict=True)
        )
    detector.criterion = detector.denoising = None  # only training calls them
    detector.canvas = None
    (sample,) = samples(size, names=names)
    analysis = count(OneImage(use_backend(detector, "grouped"), sample), sample["image"])
    empty = empty_slots(detector, sample, taken)
    modules = analysis.by_module()
    for module, operators in empty.items():
        for name in modules:
            if f"{module}.".startswith(f"{name}."):
                modules[name] -= operators.total()
    modules = {
        name.removeprefix("detector."): int(number)
        for name, number in modules.items()
        if 0 < name.count(".") <= depth and number
    }
    flops = by_part(analysis, empty)
    layers = flops["stages"]["decoder"] - flops["decoder"]["heads"] - flops["decoder"]["other"]
    flops["decoder_layer"] = layers // len(detector.decoder.layers)
    return {"flops": flops, "parameters": parameters, "modules": modules}
