"""Argument checks of the entries: one clear error that names the argument, before anything runs."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .activations import ACTIVATIONS, GATED

DEBUG_VARIABLE = "DYNAMIC_DINO_KERNELS_DEBUG"


def check_router(tokens: Tensor, weight: Tensor, k: int, name: str) -> None:
    if tokens.dim() != 2 or weight.dim() != 2 or tokens.shape[1] != weight.shape[1]:
        raise ValueError(
            "tokens must be [T, D] and weight [E, D], but their shapes are "
            f"{tuple(tokens.shape)} and {tuple(weight.shape)}"
        )
    if not 1 <= k <= len(weight):
        raise ValueError(f"{name} is {k}, but must lie between 1 and E={len(weight)}")


def check_experts(x, w1, b1, w2, b2, activation, norm) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
    if x.dim() != 2:
        raise ValueError(f"x must be [T, D], but its shape is {tuple(x.shape)}")
    gated = activation in GATED
    if w1.dim() != 3 or (gated and w1.shape[1] % 2):
        form = f"[E, 2H, D] for {activation!r}, gate half first" if gated else "[E, H, D]"
        raise ValueError(f"w1 must be {form}, but its shape is {tuple(w1.shape)}")
    (tokens, dim), (experts, rows, _) = x.shape, w1.shape
    hidden = rows // 2 if gated else rows
    expected = {
        "w1": (w1, (experts, rows, dim)),
        "b1": (b1, (experts, rows)),
        "w2": (w2, (experts, dim, hidden)),
        "b2": (b2, (experts, dim)),
    }
    half = f"half the rows of w1, since {activation!r} is gated" if gated else "w1"
    sizes = f"T={tokens}, D={dim} (x), E={experts}, H={hidden} ({half})"
    if not gated and w2.dim() and w2.shape[-1] * 2 == rows:
        sizes += f" (2H rows of w1 go with a gated activation: {', '.join(GATED)})"
    _check_shapes(expected, sizes, x.device)
    if norm is not None:
        for name, tensor in zip(("weight", "bias"), norm[:2], strict=True):
            if tuple(tensor.shape) != (dim,):
                raise ValueError(
                    f"norm must be (weight [D], bias [D], eps) for D={dim} (x), but the shape of "
                    f"its {name} is {tuple(tensor.shape)}"
                )
    for name, tensor in {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2}.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, but it is {tensor.dtype}")
    for name, tensor in {"x": x, "w1": w1, "w2": w2}.items():
        if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"the last dimension of {name} must be contiguous, but its strides are "
                f"{tensor.stride()}: pass {name}.contiguous()"
            )


def check_routing(x, w1, expert_ids, gates) -> None:
    if expert_ids.dim() != 2:
        raise ValueError(f"expert_ids must be [T, K], but its shape is {tuple(expert_ids.shape)}")
    tokens, experts, slots = x.shape[0], w1.shape[0], expert_ids.shape[1]
    expected = {"expert_ids": (expert_ids, (tokens, slots))}
    if gates is not None:
        expected["gates"] = (gates, (tokens, slots))
    _check_shapes(expected, f"T={tokens} (x), E={experts} (w1), K={slots} (expert_ids)", x.device)
    if slots > experts:
        raise ValueError(f"expert_ids has K={slots} slots, more than the E={experts} experts of w1")
    if gates is not None and not gates.is_floating_point():
        raise TypeError(f"gates must be a floating-point tensor, but it is {gates.dtype}")
    if expert_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"expert_ids must be int32 or int64, but it is {expert_ids.dtype}")
    if _ids_are_checked(expert_ids):
        low, high = (int(bound) for bound in expert_ids.aminmax())
        if low < -1 or high >= experts:
            raise ValueError(
                f"expert_ids must lie in [-1, {experts - 1}], but they span [{low}, {high}]"
            )


def check_one_dtype(x, w1, b1, w2, b2) -> None:
    for name, tensor in {"w1": w1, "b1": b1, "w2": w2, "b2": b2}.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, but x is {x.dtype}")


def _check_shapes(expected: dict, sizes: str, device: torch.device) -> None:
    for name, (tensor, shape) in expected.items():
        if tensor is None and name in ("b1", "b2"):
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for {sizes}, but its shape is {tuple(tensor.shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {device}")


def _ids_are_checked(expert_ids: Tensor) -> bool:
    """Where it costs no synchronisation, or is asked for; values can't be read while tracing."""
    if torch.compiler.is_compiling() or expert_ids.numel() == 0:
        return False
    return expert_ids.device.type == "cpu" or debugging()


def debugging() -> bool:
    return os.environ.get(DEBUG_VARIABLE) == "1"
