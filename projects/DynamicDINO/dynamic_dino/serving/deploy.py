"""A trained detector made ready to serve: the same results, less to compute.

Batch norms become part of the convolutions before them, as GELU does on a CPU, which after a linear
layer works in place; the branches of RepVGG blocks become one convolution (arXiv 2101.03697,
section 3.3); weights are cast once, and on a CPU packed for oneDNN where that is faster. It can't
be trained after.

GELU is fused here and not left to torch.compile, since that needs a C++ compiler and compiles each
shape anew: it is a tenth of the backbone's time (EfficientViT-L1 at 320 pixels, one thread with
AVX2: 0.46 s instead of 0.50 s).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import torch
from timm.layers.activations import GELUTanh
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..modeling.detector import OpenVocabularyDetector
from ..modeling.enhancer import EdgeEnhancer, RepBlock
from .accelerate import accelerate
from .packing import packed_modules

TEXT_STEP = 16  # tokens and phrases; every shape of a prompt is captured or compiled anew


def optimize_for_inference(
    detector: OpenVocabularyDetector,
    dtype: torch.dtype = torch.float32,
    mode: str = "eager",
    pack: str = "auto",
) -> OpenVocabularyDetector:
    """Folds, merges and casts, in place, and accelerates the two parts that run on tensors alone,
    the backbone and all that follows it; the detector then is in evaluation mode for good.

    In float32 the results differ from the trained model's by rounding, about 1e-5 of a logit.

    Of this one detector, ``backbone.forward`` and ``detect_chunks`` are replaced by accelerated
    functions, and ``text_encoder.pad_to`` is set: a module in the place of the backbone would
    change the names of its weights.

    Args:
        mode: "eager", "compile" or "graph", see `accelerate`.
        pack: whether linear layers and experts are packed for oneDNN: "auto", "always" or "never",
            see `packed_modules`. A packed detector is for float32 on a CPU; it can be traced by
            torch.export, with the plain weights, but not by torch.jit, and torch.compile, which
            has its own linear layers, gets them plain.

    Raises:
        ValueError: `mode` or `pack` is none of these, or pack="always" where that can't be.
    """
    detector.eval().requires_grad_(False)
    convolutions = nn.ModuleList([detector.backbone])
    if isinstance(detector.enhancer, EdgeEnhancer):
        convolutions.extend([detector.enhancer.input_proj, detector.enhancer.cross_scale])
    fold_batch_norms(convolutions, lambda: _convolve(detector))
    merge_branches(convolutions)
    fuse_gelu(convolutions, lambda: _convolve(detector))
    pixels = detector.pixel_mean, detector.pixel_std
    detector.to(dtype)
    detector.pixel_mean, detector.pixel_std = pixels  # images are normalised in float32
    if mode == "compile":
        if pack == "always":
            raise ValueError("pack='always' doesn't go with accelerate='compile'")
        pack = "never"
    rows = detector.query_selection.num_queries
    replace_modules(detector, packed_modules(detector, rows, pack))
    detector.backbone.forward = accelerate(detector.backbone.forward, mode)
    detector.detect_chunks = accelerate(detector.detect_chunks, mode)
    detector.text_encoder.pad_to = 1 if mode == "eager" else TEXT_STEP
    return detector


def _convolve(detector: OpenVocabularyDetector) -> None:
    """Runs the backbone and the convolutions of the enhancer on a small image."""
    features = detector.backbone(torch.zeros(1, 3, 64, 64, device=detector.device))
    if not isinstance(detector.enhancer, EdgeEnhancer):
        return
    maps = [p(f) for p, f in zip(detector.enhancer.input_proj, features.values(), strict=True)]
    detector.enhancer.cross_scale(maps)


def fold_batch_norms(model: nn.Module, run: Callable[[], object]) -> int:
    """Folds every batch norm into the convolution whose output it reads; returns how many.

    Args:
        run: a forward pass, see `_readers`.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    for norm, convolution in _readers(model, _BatchNorm, run).items():
        replaced[convolution] = fuse_conv_bn_eval(convolution, norm)
        replaced[norm] = getattr(norm, "act", nn.Identity())  # timm's norms may bring one
    replace_modules(model, replaced)
    return len(replaced) // 2


def fuse_gelu(model: nn.Module, run: Callable[[], object]) -> int:
    """Fuses each GELU with the convolution before it, or makes it overwrite the output of the
    linear layer before it; returns how many GELUs there were.

    Args:
        run: a forward pass, see `_readers`.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    gelus = _readers(model, (nn.GELU, GELUTanh), run, (nn.Conv2d, nn.Linear))
    for gelu, source in gelus.items():
        tanh = isinstance(gelu, GELUTanh) or gelu.approximate == "tanh"
        approximate = "tanh" if tanh else "none"
        if isinstance(source, nn.Linear):
            replaced[gelu] = GELUInPlace(approximate)
        else:
            replaced[source] = ConvGELU(source, approximate)
            replaced[gelu] = nn.Identity()
    replace_modules(model, replaced)
    return len(gelus)


class GELUInPlace(nn.Module):
    """GELU that overwrites its input, for inference: maps as large needn't be allocated anew."""

    def __init__(self, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(x, approximate=self.approximate)


class ConvGELU(nn.Module):
    """GELU of a convolution: on a CPU in one oneDNN call where it is fast, else in its memory."""

    def __init__(self, convolution: nn.Conv2d, approximate: str) -> None:
        super().__init__()
        self.convolution, self.approximate = convolution, approximate

    def forward(self, x: Tensor) -> Tensor:
        c = self.convolution
        if self._fuses(x):
            # What torch.compile makes of the pair; there is no public name for it.
            sizes = (c.padding, c.stride, c.dilation, c.groups)
            return torch.ops.mkldnn._convolution_pointwise(
                x, c.weight, c.bias, *sizes, "gelu", [], self.approximate
            )
        y = c(x)
        wanted = y.is_cpu and y.dtype == torch.float32 and self.approximate == "tanh"
        if wanted and not torch.compiler.is_compiling():
            return gelu_tanh_(y)
        return torch.ops.aten.gelu_(y, approximate=self.approximate)

    def _fuses(self, x: Tensor) -> bool:
        if not (x.is_cpu and isinstance(self.convolution.padding, tuple)):
            return False
        if self.approximate == "tanh" and torch.backends.cpu.get_cpu_capability() != "AVX512":
            return False  # oneDNN looks tanh up in a table, which AVX2 does slowly
        if x.dtype == torch.bfloat16:
            return torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def gelu_tanh_(x: Tensor, block: int = 2**18) -> Tensor:
    """GELU with tanh, of a feature map on a CPU, in place; in half of the time of PyTorch's.

    0.5 (1 + tanh u) = sigmoid(2u) with u = sqrt(2 / pi) (x + 0.044715 x^3), and PyTorch's sigmoid
    costs a third of its tanh. Blocks stay in the cache from one pass to the next.
    """
    last = x.is_contiguous(memory_format=torch.channels_last)
    flat = (x.movedim(1, -1) if last else x).view(-1)
    buffer = flat.new_empty(min(block, len(flat)))
    linear, cubic = 2 * (2 / math.pi) ** 0.5, 2 * (2 / math.pi) ** 0.5 * 0.044715
    for part in flat.split(block):
        gate = torch.mul(part, part, out=buffer[: len(part)])
        part.mul_(gate.mul_(cubic).add_(linear).mul_(part).sigmoid_())
    return x


def _readers(
    model: nn.Module,
    kinds: type | tuple[type, ...],
    run: Callable[[], object],
    sources: type | tuple[type, ...] = nn.Conv2d,
) -> dict[nn.Module, nn.Module]:
    """{module of one of the `kinds`: the convolution (or other source) whose output it reads}.

    Names and order of modules differ from network to network, so `run`, a forward pass, shows which
    it is: both run once, and one's output is the other's input.
    """
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensor is kept, so its id stays its own
    source: dict[nn.Module, nn.Module] = {}
    runs: Counter[nn.Module] = Counter()

    def after_source(module, _, output) -> None:
        outputs[id(output)] = (module, output)
        runs[module] += 1

    def before_reader(module, inputs) -> None:
        runs[module] += 1
        if id(inputs[0]) in outputs:
            source[module] = outputs[id(inputs[0])][0]

    hooks = []
    for module in model.modules():
        if isinstance(module, sources):
            hooks.append(module.register_forward_hook(after_source))
        elif isinstance(module, kinds):
            hooks.append(module.register_forward_pre_hook(before_reader))
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return {reader: c for reader, c in source.items() if runs[reader] == runs[c] == 1}


def merge_branches(model: nn.Module) -> int:
    """Makes one 3x3 convolution of each RepVGG block whose norms are folded; returns how many."""
    replaced: dict[nn.Module, nn.Module] = {}
    for block in model.modules():
        if isinstance(block, RepBlock):
            merged, point = block.conv3[0], block.conv1[0]
            merged.weight.data[:, :, 1:2, 1:2] += point.weight.data
            merged.bias.data += point.bias.data
            replaced[block] = nn.Sequential(merged, nn.SiLU(inplace=True))
    replace_modules(model, replaced)
    return len(replaced)


def replace_modules(model: nn.Module, replaced: dict[nn.Module, nn.Module]) -> None:
    """Replaces modules, {old: new}, in every place where the model has them."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves repetitions out
            if child in replaced:
                setattr(parent, name, replaced[child])
