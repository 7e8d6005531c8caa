"""A served detector's linear layers and experts on weights that are packed once for oneDNN.

Same results but for rounding, in float32 on a CPU. Whether oneDNN is faster there than what PyTorch
takes by itself depends on the processor, so it is measured, for every size of a layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from dynamic_dino_kernels import resolve_backend
from dynamic_dino_kernels.moe.packed import expert_gain, pack_experts
from dynamic_dino_kernels.packing import POST_OPS, PackedWeight, gain, obstacle, packed_linear
from torch import Tensor, nn

from ..modeling.attention import BiAttention
from ..modeling.feed_forward import FeedForward
from ..moe.experts import Experts
from ..moe.layer import MoEFeedForward
from ..moe.routing import Routing

logger = logging.getLogger(__name__)

PACK = ("auto", "always", "never")
ENOUGH = 1.1  # times as fast: less isn't told from noise
PARTS_LEFT = ("text_encoder", "criterion", "denoising")  # not run for every image
FACTORS = ("image_query", "image_value", "image_out")  # of BiAttention, which reads their weights


def packed_modules(model: nn.Module, rows: int, pack: str = "auto") -> dict[nn.Module, nn.Module]:
    """{module of a detector: its packed replacement}; logs what was chosen.

    Args:
        model: on a CPU, in float32; anything else can't be packed.
        rows: how many rows its layers mostly get: its queries.
        pack: "auto": where that is measured to be faster; "always": wherever it is possible;
            "never": nowhere.

    Raises:
        ValueError: `pack` is none of these, or it is "always" and nothing can be packed.
    """
    if pack not in PACK:
        raise ValueError(f"pack={pack!r}: choose one of {', '.join(PACK)}")
    weights = next(model.parameters())
    reason = obstacle(weights.device, weights.dtype)
    if pack == "always" and reason:
        raise ValueError(f"pack='always', but {reason}")
    if pack == "never" or reason:
        return {}
    found = _candidates(model, rows)
    gains = {c: c.gain() for c in found} if pack == "auto" else {}
    chosen = [c for c in found if pack == "always" or gains[c] >= ENOUGH]
    replaced: dict[nn.Module, nn.Module] = {}
    for candidate in chosen:
        replaced[candidate.module] = candidate.make()
        if candidate.activation is not None:
            replaced[candidate.activation] = nn.Identity()
    _log(found, chosen, gains)
    return replaced


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A module that can be packed; cost: its multiplications; activation: the module after it that
    becomes part of it."""

    module: nn.Module
    cost: int
    gain: Callable[[], float]
    make: Callable[[], nn.Module]
    activation: nn.Module | None = None


def _candidates(model: nn.Module, rows: int) -> list[_Candidate]:
    """All that runs for every image, each module once."""
    parts = [part for name, part in model.named_children() if name not in PARTS_LEFT]
    found: dict[nn.Module, _Candidate] = {}
    left: set[nn.Module] = set()
    for parent in (m for part in parts for m in part.modules()):  # a parent before its children
        if isinstance(parent, BiAttention):
            left.update(getattr(parent, name) for name in FACTORS)
        elif type(parent) is FeedForward and parent.activation in POST_OPS:
            found[parent] = _ffn(parent, rows)
            left.update((parent.linear1, parent.linear2))
        elif isinstance(parent, MoEFeedForward) and _can_be_packed(parent.experts):
            number = parent.router.num_experts
            few = max(1, rows * parent.router.top_k // number)
            found[parent.experts] = _experts(parent.experts, few, few * number)
        elif isinstance(parent, nn.Sequential):
            for layer, after in pairwise(parent):
                if type(layer) is nn.Linear and type(after) in _POST_OPS:
                    found[layer] = _linear(layer, rows, after)
        for layer in parent.children():
            if type(layer) is nn.Linear and layer not in left and layer not in found:
                found[layer] = _linear(layer, rows)
    return list(found.values())


_POST_OPS = {nn.ReLU: "relu", nn.SiLU: "silu"}


def _linear(layer: nn.Linear, rows: int, after: nn.Module | None = None) -> _Candidate:
    activation = "none" if after is None else _POST_OPS[type(after)]
    return _Candidate(
        layer,
        rows * layer.weight.numel(),
        lambda: gain(rows, layer.in_features, layer.out_features, activation),
        lambda: PackedLinear(layer, rows, activation),
        after,
    )


def _ffn(ffn: FeedForward, rows: int) -> _Candidate:
    hidden, dim = ffn.linear1.weight.shape
    return _Candidate(
        ffn,
        rows * 2 * dim * hidden,
        lambda: expert_gain(rows, dim, hidden, ffn.activation),
        lambda: PackedFeedForward(ffn, rows),
    )


def _experts(experts: Experts, rows: int, all_rows: int) -> _Candidate:
    _, hidden, dim = experts.w1.shape
    return _Candidate(
        experts,
        all_rows * 2 * dim * hidden,
        lambda: expert_gain(rows, dim, hidden, experts.activation),
        lambda: PackedExperts(experts, rows),
    )


def _can_be_packed(experts: Experts) -> bool:
    if type(experts) is not Experts:  # one that runs them in another way
        return False
    return experts.activation in POST_OPS and resolve_backend(experts.backend, "cpu") == "grouped"


def _log(found: list[_Candidate], chosen: list[_Candidate], gains: dict) -> None:
    if not chosen:
        best = max(gains.values(), default=1)
        logger.info("Weights not packed for oneDNN: at best that is %.2f times as fast here", best)
        return
    counts = []
    for name, experts in (("mixtures of experts", True), ("linear layers and FFNs", False)):
        here, all_ = (
            sum(isinstance(c.module, Experts) == experts for c in of) for of in (chosen, found)
        )
        counts.append(f"{here} of {all_} {name}")
    plain = sum(c.cost for c in found)
    packed = sum(c.cost / (gains[c] if c in chosen else 1) for c in found) if gains else 0
    speed = f", which makes these {plain / packed:.2f} times as fast" if gains else ""
    logger.info("Weights packed for oneDNN: %s%s", ", ".join(counts), speed)


class _Packed(nn.Module):
    """What can't be cast, moved or loaded into any more; `state_dict` gives the plain weights."""

    def _apply(self, function, recurse=True):
        probe = function(torch.empty(0))
        if probe.dtype != torch.float32 or not probe.is_cpu:
            raise RuntimeError(
                "this detector's weights are packed for float32 on a CPU and can't be cast or "
                "moved: load it as you need it (load_detector's device= and dtype=), or with "
                "pack='never'"
            )
        return super()._apply(function, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, weight in self.dense().items():
            destination[prefix + name] = weight

    def _load_from_state_dict(self, *args) -> None:
        raise RuntimeError(
            "this detector's weights are packed, so none can be loaded: load them first, then call "
            "optimize_for_inference; or give load_detector the weights"
        )


class PackedLinear(_Packed):
    """A linear layer [..., in] -> [..., out] and the activation after it, see `packed_linear`.

    Args:
        rows: how many there mostly are.
    """

    def __init__(self, linear: nn.Linear, rows: int, activation: str = "none") -> None:
        super().__init__()
        self.packed, self.bias = PackedWeight(linear.weight.detach(), rows), linear.bias
        self.activation = activation
        self.out_features, self.in_features = linear.weight.shape

    @property
    def weight(self) -> Tensor:
        """[out, in], unpacked for whoever reads it"""
        return self.packed.dense()

    def dense(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.packed, self.bias, self.activation)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.activation}"


class PackedFeedForward(nn.Module):
    """`FeedForward` of packed layers, the activation within the first."""

    def __init__(self, ffn: FeedForward, rows: int) -> None:
        super().__init__()
        self.linear1 = PackedLinear(ffn.linear1, rows, ffn.activation)
        self.linear2 = PackedLinear(ffn.linear2, rows)

    def forward(
        self, x: Tensor, scene: Tensor | None = None, norm: nn.LayerNorm | None = None
    ) -> tuple[Tensor, None]:
        y = self.linear2(self.linear1(x))
        return (y if norm is None else norm(x + y)), None


class PackedExperts(_Packed):
    """`Experts` on packed weights."""

    def __init__(self, experts: Experts, rows: int) -> None:
        super().__init__()
        weights = (experts.w1, experts.b1, experts.w2, experts.b2)
        self.run = pack_experts(*weights, activation=experts.activation, rows=rows)

    def dense(self) -> dict[str, Tensor]:
        return dict(zip(("w1", "b1", "w2", "b2"), self.run.dense(), strict=True))

    def forward(self, x: Tensor, routing: Routing, norm: nn.LayerNorm | None = None) -> Tensor:
        norm = norm and (norm.weight, norm.bias, norm.eps)
        return self.run(x, routing.expert_ids, routing.gates, norm=norm)
