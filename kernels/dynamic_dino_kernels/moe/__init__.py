"""Router and expert FFN: every token passes through the few experts chosen for it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend
from . import reference
from .reference import ACTIVATIONS

__all__ = ["ACTIVATIONS", "expert_ffn", "route"]


def route(
    tokens: Tensor, weight: Tensor, top_k: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """p = softmax(W x), its k largest entries, and the softmax over those k, times k.

    Computed in float32 at least, outside autocast. Ties go to the lowest index, and experts with
    equal rows get equal logits, bit for bit: the siblings that MoE-Tuning makes win together.

    Args:
        tokens: float [T, D].
        weight: float [E, D], one row per expert.
        top_k: k, from 1 to E.
        backend: see `dynamic_dino_kernels.resolve_backend`; all but "triton" are plain torch.

    Returns:
        expert_ids int32 [T, k], best first; gates float32 [T, k], which add up to k; and probs
        float32 [T, E]. Gates and probs are differentiable in tokens and weight.

    Raises:
        ValueError: shapes that don't fit, or k out of range; the message names them.
    """
    if tokens.dim() != 2 or weight.dim() != 2 or tokens.shape[1] != weight.shape[1]:
        raise ValueError(
            "tokens must be [T, D] and weight [E, D], but their shapes are "
            f"{tuple(tokens.shape)} and {tuple(weight.shape)}"
        )
    if not 1 <= top_k <= len(weight):
        raise ValueError(f"top_k is {top_k}, but must lie between 1 and E={len(weight)}")
    implementation = reference.route
    if resolve_backend(backend, tokens.device) == "triton":
        from .router import triton_route as implementation  # imports Triton
    with torch.autocast(tokens.device.type, enabled=False):
        return implementation(tokens, weight, top_k)


def expert_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    *,
    activation: str = "relu",
    backend: str = "auto",
) -> Tensor:
    """y[t] = sum_k gates[t, k] * (act(x[t] W1[e]^T + b1[e]) W2[e]^T + b2[e]), e = expert_ids[t, k].

    Equation 4 of Dynamic-DINO (arXiv 2507.17436). Differentiable in x, the weights and the gates;
    experts without tokens get explicit zero gradients. Under autocast the matmuls run in the
    autocast dtype, as those of nn.Linear do.

    Args:
        x: float [T, D], T tokens.
        w1, b1, w2, b2: float [E, H, D], [E, H], [E, D, H], [E, D], E experts in the orientation of
            nn.Linear, of the dtype of x unless autocast is on.
        expert_ids: int32 or int64 [T, K]; -1 is an empty slot, which contributes nothing.
        gates: float [T, K]; ignored where the slot is empty.
        activation: "relu", "gelu" (exact) or "silu".
        backend: see `dynamic_dino_kernels.resolve_backend`.

    Returns:
        float [T, D] in the dtype of x, or the autocast dtype.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it. Ids are checked
            against E on the CPU only: on CUDA that would stop the stream at every call.
    """
    name = resolve_backend(backend, x.device)
    if name == "triton":
        from .ops import triton_ffn as implementation  # imports Triton
    else:
        implementation = getattr(reference, name)
    _check_arguments(x, w1, b1, w2, b2, expert_ids, gates, activation)

    device_type = x.device.type
    floats = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        floats = {
            name: t if t.dtype == torch.float64 else t.to(dtype) for name, t in floats.items()
        }
    for name, tensor in floats.items():
        if tensor.dtype != floats["x"].dtype:
            raise TypeError(f"{name} is {tensor.dtype}, but x is {floats['x'].dtype}")

    with torch.autocast(device_type, enabled=False):
        return implementation(*floats.values(), expert_ids, gates, activation)


def _check_arguments(x, w1, b1, w2, b2, expert_ids, gates, activation) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}: choose one of {', '.join(ACTIVATIONS)}")

    if x.dim() != 2:
        raise ValueError(f"x must be [T, D], but its shape is {tuple(x.shape)}")
    if w1.dim() != 3:
        raise ValueError(f"w1 must be [E, H, D], but its shape is {tuple(w1.shape)}")
    if expert_ids.dim() != 2:
        raise ValueError(f"expert_ids must be [T, K], but its shape is {tuple(expert_ids.shape)}")
    (tokens, dim), (experts, hidden, _), slots = x.shape, w1.shape, expert_ids.shape[1]
    sizes = f"T={tokens}, D={dim} (x), E={experts}, H={hidden} (w1), K={slots} (expert_ids)"
    expected = {
        "w1": (w1, (experts, hidden, dim)),
        "b1": (b1, (experts, hidden)),
        "w2": (w2, (experts, dim, hidden)),
        "b2": (b2, (experts, dim)),
        "expert_ids": (expert_ids, (tokens, slots)),
        "gates": (gates, (tokens, slots)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for {sizes}, but its shape is {tuple(tensor.shape)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}")
    if slots > experts:
        raise ValueError(f"expert_ids has K={slots} slots, more than the E={experts} experts of w1")

    for name, tensor in {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2, "gates": gates}.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, but it is {tensor.dtype}")
    for name, tensor in {"x": x, "w1": w1, "w2": w2}.items():
        if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"the last dimension of {name} must be contiguous, but its strides are "
                f"{tensor.stride()}: pass {name}.contiguous()"
            )
    if expert_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"expert_ids must be int32 or int64, but it is {expert_ids.dtype}")
    if expert_ids.device.type == "cpu" and expert_ids.numel():
        low, high = (int(bound) for bound in expert_ids.aminmax())
        if low < -1 or high >= experts:
            raise ValueError(
                f"expert_ids must lie in [-1, {experts - 1}], but they span [{low}, {high}]"
            )
